"""The program every process runs: `python -m launcher.train`, or under `accelerate launch` or `torchrun … -m launcher.train`.

Checks come first, then the imports that take seconds, then `loop.train`.
"""

import contextlib
import os
import shlex
from typing import Any

from launcher import data, failures, imports, rundir
from launcher.beat import Beat
from launcher.catalogue import card
from launcher.choices import refuse
from launcher.compose import load
from launcher.config import Config
from launcher.data import Splits
from launcher.errors import EXIT_STOPPED, UserError, run_main
from launcher.plan import COMMAND, require_room
from launcher.ranks import is_launched, rank, world_size
from launcher.rundir import logs_dir
from launcher.stopping import Stop
from launcher.strategies import launched
from launcher.variables import parse
from launcher.weights import fetch, fetch_again


def main(args: list[str], splits: Splits | None = None) -> int:
    """Train the configuration that `args` describe (see `variables.parse`); returns the exit code.

    `splits` are its data where they have been read already.
    """
    stop = Stop().install()
    given = parse(args)
    config = load(given)
    if given.ngpu not in (None, world_size()):
        raise UserError(
            f"NGPU={given.ngpu}, but {world_size()} process(es) were started; try: make train NGPU={given.ngpu}"
        )
    command = os.environ.get(COMMAND) or shlex.join(["python", "-m", "launcher.train", *args])
    logs = logs_dir(config.run_dir) if is_launched() else None
    if logs:
        rundir.make_folder(logs)
    beat = Beat(logs / f"rank-{rank()}.beat" if logs else None)
    with failures.recorded(logs, rank(), beat):
        code = run(config, command, stop, beat, splits)
        if logs and code == EXIT_STOPPED:
            failures.record(logs, rank(), "stopped", beat.doing, "told to stop")
        return code


def run(config: Config, command: str, stop: Stop, beat: Beat, splits: Splits | None = None) -> int:
    """All that can be refused, and the download, before the processes join: nobody waits for one that has left."""
    before = check_and_claim(config)
    splits = splits or data.read(config.data)
    if before:
        splits.require(before["data"], config.data.source)
        weights = fetch_again(card(config.model.name), before["base"])
    else:
        weights = fetch(card(config.model.name), config.model.revision)
    stop.check()
    with imports.heavy():
        from launcher import loop, models
        from launcher.job import assemble
        from launcher.material import load_material
        from launcher.processes import start_processes

    architecture = models.read_architecture(weights.path)
    require_room(config.adapter, architecture)
    template = card(config.model.name).template
    material = load_material(config, splits, weights.path, architecture.context, template)
    stop.check()
    beat.at("joining the other processes")
    accelerator = start_processes(config, architecture)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(rundir.locked(config.run_dir))
        return loop.train(assemble(config, accelerator, weights, material, architecture, stop, beat), command)


def check_and_claim(config: Config) -> dict[str, Any] | None:
    """The manifest of an interrupted run that this one goes on with; raises `UserError` for what cannot be trained."""
    if why := refuse(config, launched(config.parallel.strategy).name, world_size()):
        raise UserError(why)
    return rundir.read_manifest(config.run_dir) if rundir.check_claim(config) else None


if __name__ == "__main__":
    run_main(main)
