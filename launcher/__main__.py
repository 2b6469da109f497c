"""The front door: `python -m launcher {train,plan,data,eval,compare} [CONFIG.yaml] [VARIABLE=value …] [section.option=value …]`."""

import os
import sys

from launcher import data, rundir, variables
from launcher.catalogue import card
from launcher.compose import load
from launcher.config import Config
from launcher.errors import UserError, nearest, run_main
from launcher.hardware import detect
from launcher.plan import Plan, num_steps, plan
from launcher.weights import fetch, fetch_words, require_token

# What only the front door reads; the rest is handed on to launcher.train as it was given.
OURS = ("NGPU",)


def make_plan(args: list[str]) -> tuple[Config, Plan]:
    """Check everything that can be checked without torch, and decide what will run."""
    given = variables.parse(args)
    config = load(given)
    require_token(card(config.model.name))
    train_args = [arg for arg in args if arg.partition("=")[0] not in OURS and not arg.endswith("=")]
    return config, plan(config, given.ngpu or 1, detect(), train_args)


def show(config: Config, decided: Plan, num_examples: int) -> None:
    """Print the plan, ending with the command that it is."""
    batch = f"{decided.micro} x {decided.accumulation} x {decided.world}"
    print(f"model      {config.model.name}, {decided.dtype}{', 4-bit base' if config.quant.bits else ''}")
    print(f"method     {config.adapter.method}")
    print(f"data       {config.data.source}, {num_examples} training examples")
    print(f"strategy   {decided.strategy}, {decided.world} process{'es' * (decided.world > 1)}")
    print(f"batch      {config.batch.size} = micro {batch} (micro x accumulation x processes)")
    print(f"steps      {num_steps(config, num_examples)}")
    for note in decided.notes:
        print(f"note       {note}")
    environment = " ".join(f"{name}={value}" for name, value in decided.env.items())
    print(f"command    {environment} {' '.join(decided.argv)}")


def run_plan(args: list[str]) -> int:
    """`make plan`: show what `make train` would do, and do nothing."""
    config, decided = make_plan(args)
    show(config, decided, len(data.read(config.data).train))
    print("Next: the same variables with `make train`.")
    return 0


def run_train(args: list[str]) -> int:
    """`make train`: check, plan, bring the weights here, then become the training program."""
    config, decided = make_plan(args)
    data.read(config.data)
    if not rundir.check_claim(config):
        fetch(card(config.model.name), config.model.revision)
    sys.stdout.flush()
    os.execvpe(decided.argv[0], decided.argv, {**os.environ, **decided.env})


def run_data(args: list[str]) -> int:
    """`make data`: show what would be learned: counts, and one example with its trained part marked."""
    config = load(variables.parse(args))
    require_token(card(config.model.name))
    splits = data.read(config.data)
    folder = fetch_words(card(config.model.name), config.model.revision)
    from rich.console import Console

    from launcher import material, models, preview

    found = material.load_material(config, splits, folder, models.read_shape(folder).context)
    preview.show(Console(highlight=False), found, config.data)
    print("Next: the same variables with `make train`.")
    return 0


def run_eval(args: list[str]) -> int:
    """`make eval`: measure a finished run beside its base."""
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
    return COMMANDS[args[0]](args[1:])


if __name__ == "__main__":
    run_main(main)
