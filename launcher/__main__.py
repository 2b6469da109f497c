"""The front door: `python -m launcher {train,plan,data,eval,compare} [CONFIG.yaml] [VARIABLE=value …] [section.option=value …]`."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from launcher import architecture, data, imports, rundir, supervise, train, variables
from launcher.architecture import Architecture
from launcher.arithmetic import num_steps
from launcher.catalogue import card
from launcher.choices import Demand
from launcher.compose import load
from launcher.config import Config
from launcher.data import Splits
from launcher.errors import UserError, nearest, run_main
from launcher.hardware import describe, detect
from launcher.plan import COMMAND, Nodes, Plan, plan
from launcher.plan_text import first_lines, plan_lines
from launcher.ports import meeting_port
from launcher.variables import FRONT_DOOR, Variables
from launcher.weights import fetch, fetch_words, require_token


def read(args: list[str]) -> tuple[Variables, Config]:
    """What was given, and the configuration that it composes."""
    given = variables.parse(args)
    return given, load(given)


def make_plan(args: list[str], given: Variables, config: Config) -> tuple[Splits, Plan]:
    """Check everything that can be checked without torch and without weights, and decide what will run."""
    hardware = describe(given.hardware) if given.hardware else detect()
    ngpu = given.ngpu or (hardware.num_gpus if given.hardware and config.adapter.method != "qlora" else 1)
    machines = nodes(given, config)
    # What is impossible is told before any data are read.
    plan(config, ngpu, hardware, [], nodes=machines)
    splits = data.read(config.data)
    model = find_architecture(config)
    longest = min(config.data.max_length, splits.longest_tokens, model.context if model else config.data.max_length)
    train_args = [arg for arg in args if arg.partition("=")[0] not in FRONT_DOOR]
    return splits, plan(config, ngpu, hardware, train_args, Demand(model, longest), machines)


def nodes(given: Variables, config: Config) -> Nodes:
    """The machines of this training."""
    if given.num_nodes == 1:
        return Nodes()
    port = given.master_port or meeting_port(str(config.run_dir), os.environ)
    return Nodes(given.num_nodes, given.node_rank, given.master_addr, port)


def find_architecture(config: Config) -> Architecture | None:
    """The sizes of the model, from its card, its folder or the hub; None where they cannot be had now."""
    known = card(config.model.name)
    if known.config:
        return architecture.read(known.config)
    if known.folder:
        return architecture.read_file(Path(known.folder))
    try:
        return architecture.read_file(fetch_words(known, config.model.revision))
    except UserError:
        return None


def run_plan(args: list[str]) -> int:
    """`make plan`: show what `make train` would do, and do nothing; with PROBE=yes try a few steps of it."""
    given, config = read(args)
    splits, decided = make_plan(args, given, config)
    for line in plan_lines(config, decided, len(splits.train)):
        print(line)
    if given.is_probed:
        if given.hardware:
            raise UserError("PROBE=yes needs the hardware itself, not HARDWARE=; try one or the other")
        from launcher import probe

        print(probe.run(args, decided, num_steps(config, len(splits.train))))
    on_that_box = f" on that box, with NGPU={len(decided.ranks)}" if given.hardware else ""
    print(f"Next: the same variables with `make train`{on_that_box}.")
    return 0


def run_train(args: list[str]) -> int:
    """`make train`: check, plan, bring the weights here, then become the training program or look after several."""
    given, config = read(args)
    for name, value in (("HARDWARE", given.hardware), ("PROBE", given.is_probed)):
        if value:
            raise UserError(f"{name} is for planning, a training takes what there is; try: make plan, or without it")
    require_token(card(config.model.name))
    splits, decided = make_plan(args, given, config)
    is_resumed = rundir.check_claim(config)
    rundir.make_folder(config.run_dir)
    if not is_resumed:
        fetch(card(config.model.name), config.model.revision)
    if decided.ranks[0] == 0:  # the first machine does the talking
        print(*first_lines(decided), sep="\n", flush=True)
    os.environ[COMMAND] = shlex.join(["python", "-m", "launcher", "train", *args])
    if decided.is_supervised:
        return supervise.run(decided, config.run_dir, config.parallel.timeout_s)
    # No second program for one process: it would import and read all of this again.
    os.environ.update(decided.env)
    return train.main(decided.train_args, splits)


def run_data(args: list[str]) -> int:
    """`make data`: show what would be learned: counts, and one example with its trained part marked."""
    _, config = read(args)
    known = card(config.model.name)
    require_token(known)
    splits = data.read(config.data)
    folder = fetch_words(known, config.model.revision)
    from rich.console import Console

    with imports.heavy():
        from launcher import material, models, preview

    found = material.load_material(config, splits, folder, models.read_architecture(folder).context, known.template)
    preview.show(Console(highlight=False), found, config.data)
    print("Next: the same variables with `make train`.")
    return 0


def run_eval(args: list[str]) -> int:
    """`make eval`: measure a finished run beside its base."""
    with imports.heavy():
        from launcher import evaluate

    return evaluate.main(args)


def run_compare(args: list[str]) -> int:
    """`make compare`: several runs side by side."""
    from launcher import compare

    return compare.main(args)


COMMANDS = {"train": run_train, "plan": run_plan, "data": run_data, "eval": run_eval, "compare": run_compare}


def main(args: list[str]) -> int:
    """Dispatch on the first word."""
    if not args or args[0] not in COMMANDS:
        word = args[0] if args else "(nothing)"
        raise UserError(f"{word}: unknown command; {nearest(word, COMMANDS)} Try: make help")
    command = COMMANDS[args[0]]
    return command(args[1:]) if command is run_train else tell(command, args[1:])


def tell(command: Callable[[list[str]], int], args: list[str]) -> int:
    """Run a command that only tells something: a reader that has seen enough, as `head` has, may leave."""
    try:
        code = command(args)
        print(end="", flush=True)
    except BrokenPipeError:
        # What is still to be written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    run_main(main)
