"""A training assembled as the launcher does it, for the benchmarks."""

from launcher import data
from launcher.catalogue import card
from launcher.config import Config
from launcher.job import Job, assemble
from launcher.material import load_material
from launcher.models import read_architecture
from launcher.processes import start_processes
from launcher.weights import fetch


def assembled(config: Config) -> Job:
    """The job of this configuration, with everything but its model."""
    weights = fetch(card(config.model.name), config.model.revision)
    architecture = read_architecture(weights.path)
    material = load_material(
        config, data.read(config.data), weights.path, architecture.context, card(config.model.name).template
    )
    return assemble(config, start_processes(config, architecture), weights, material, architecture)
