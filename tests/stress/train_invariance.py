"""Train the same steps however they are shared out, and compare the losses: processes x accumulation x packing x seeds.

    python -m tests.stress.train_invariance [SEED=0] [SEEDS=2] [NGPU=1,2,4] [ACCUMULATION=1,2,4] [PACKING=on,off] [STEPS=20]

Every combination is a launch of its own, from a cold start, of a tiny model on the CPU; of each seed the first one is the reference.
Fails unless every loss of every combination is that of the reference within a thousandth, it ran as it was asked to, and
the reference has learned.
"""

import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.report import read_metrics
from tests.stress.program import begin, finish, run_program
from tests.stress.trainings import tiny_model, train

# Divides by four processes that accumulate four times.
SIZE = 16
TOLERANCE = 1e-3
# The last loss of the reference, as a share of its first.
LEARNED = 0.9


@dataclass
class Tally:
    """Launches so far, the largest difference of their losses, and the faults."""

    launches: int = 0
    farthest: float = 0.0
    faults: list[str] = field(default_factory=list)


def losses(model: Path, run: Path, *options: str) -> tuple[list[float], dict[str, Any]]:
    """Train: (the loss of every step, how the run says that it was shared out)."""
    train(model, run, f"batch.size={SIZE}", "eval.examples=1", *options)
    return [record["loss"] for record in read_metrics(run)], json.loads((run / "run.json").read_text())["training"]


def as_asked(training: dict[str, Any], world: int, accumulation: int, packing: str) -> bool:
    """True if a run was shared out as it was asked to be, by the engine that several processes need."""
    engine = "DeepSpeedEngine" if world > 1 else "Trainee"
    told = (training["world_size"], training["accumulation"], training["packing"], training["engine"])
    return told == (world, accumulation, packing == "on", engine)


def farthest(found: Sequence[float], reference: Sequence[float]) -> float:
    """The largest difference of two runs' losses, as a share of the reference; infinite where they are not as many."""
    if len(found) != len(reference):
        return math.inf
    return max(abs(a / b - 1) for a, b in zip(found, reference, strict=True))


def train_all(model: Path, folder: Path, seed: int, own: dict[str, str], tally: Tally) -> None:
    """Every combination of one seed."""
    worlds, accumulations = ([int(n) for n in own[name].split(",")] for name in ("NGPU", "ACCUMULATION"))
    reference: list[float] = []
    for case in itertools.product(worlds, accumulations, own["PACKING"].split(",")):
        world, accumulation, packing = case
        tally.launches += 1
        found, training = losses(
            model, folder / f"run-{tally.launches}", f"NGPU={world}", f"batch.micro={SIZE // world // accumulation}",
            f"batch.packing={packing}", f"optim.max_steps={own['STEPS']}", f"run.seed={seed}",
        )  # fmt: skip
        reference = reference or found
        difference = farthest(found, reference)
        tally.farthest = max(tally.farthest, difference)
        told = f"seed {seed}, {world} x {accumulation}, packing {packing}"
        print(f"{told}: {found[0]:.4f} -> {found[-1]:.4f}, differs by {difference:.1e}", flush=True)
        tally.faults += [] if as_asked(training, *case) else [f"{told}: ran as {training}"]
        tally.faults += [] if difference <= TOLERANCE else [f"{told}: losses differ by {difference:.1e}"]
    tally.faults += [] if reference[-1] < LEARNED * reference[0] else [f"seed {seed}: the reference has not learned"]


def main(args: list[str]) -> int:
    """Train every combination of every seed."""
    own, _ = begin(args, SEEDS="2", NGPU="1,2,4", ACCUMULATION="1,2,4", PACKING="on,off", STEPS="20")
    tally, first = Tally(), int(own["SEED"])
    with tempfile.TemporaryDirectory() as name:
        model = tiny_model(name)
        for seed in range(first, first + int(own["SEEDS"])):
            train_all(model, Path(name), seed, own, tally)
    return finish(tally.faults, f"{tally.launches} launches, losses differ by {tally.farthest:.1e} at most")


if __name__ == "__main__":
    run_program(main)
