"""Runs side by side: a row of a table each, and one picture of their losses over the tokens they have seen."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from launcher import rundir
from launcher.compose import load
from launcher.errors import UserError, nearest
from launcher.report import read_evaluations, read_metrics
from launcher.variables import parse

HEADER = (
    "run",
    "method",
    "base",
    "trained\nparameters",
    "examples\nx epochs",
    "tokens\nseen",
    "wall\ntime",
    "held-out\nloss",
    "perplexity",
    "exact\nmatch",
)
NUM_WORDS = 3  # the columns before the numbers
NOTHING = "—"
# Nobody looks at a pipe: a run stays one line there.
PIPE_WIDTH = 200


@dataclass(frozen=True)
class Run:
    """What a run folder tells, finished or not; `measured` is what `make eval` wrote, None before."""

    path: Path
    name: str
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    measured: dict[str, Any] | None

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing more to come."""
        return self.manifest["state"] == "finished"

    @property
    def last(self) -> dict[str, Any]:
        """The newest evaluation: of a finished run that of its whole held-out split; empty before the first."""
        return self.manifest.get("results") or (self.evaluations[-1] if self.evaluations else {})

    @property
    def tokens(self) -> dict[int, int]:
        """Tokens seen after each step; step 0 is before the first."""
        seen = itertools.accumulate((record["tokens"] for record in self.metrics), initial=0)
        return dict(zip([0, *(record["step"] for record in self.metrics)], seen, strict=True))

    @property
    def seconds(self) -> float:
        """How long it took; of an unfinished run, its steps so far."""
        # The manifest of a resumed run knows of its last attempt only, the steps know of all.
        steps = sum(record["step_s"] for record in self.metrics)
        return max(steps, self.manifest.get("results", {}).get("wall_s", 0.0))


def main(args: list[str]) -> int:
    """`make compare RUNS="a b"`: print a table and draw the losses."""
    paths = run_dirs(args)
    runs = read_runs(paths)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    show(console, runs)
    for line in [*warnings(runs), *notes(runs)]:
        print(line)
    # What draws takes a second to load; bad input has been refused by now.
    from launcher.plots import Curve, draw_curves

    curves = {run.name: Curve(*points(run)) for run in runs}
    picture = draw_curves(curves, paths[0].parent / f"compare-{'-'.join(path.resolve().name for path in paths)}")
    print(f"drawn to {picture}. Next: {next_step(runs)}")
    return 0


def run_dirs(args: list[str]) -> list[Path]:
    """The folders that `RUNS="a b"` (several) and `RUN=a` (one) name; raises `UserError` with every fault found."""
    names: list[str] = []
    faults: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if not equals:
            faults.append(
                f'{arg}: runs are named by a variable; try RUNS="{" ".join(a for a in args if "=" not in a)}"'
            )
        elif name in ("RUNS", "RUN"):
            names += value.split() if name == "RUNS" else [value]
        else:
            faults.append(f'{name}: unknown variable; {nearest(name, ("RUNS", "RUN"))} Try RUNS="one another"')
    if faults:
        raise UserError(*faults)
    found = {path.resolve(): path for path in (load(parse([f"RUN={name}"])).run_dir for name in names if name)}
    if len(found) < 2:
        told = " ".join(names)
        raise UserError(f'RUNS="{told}": a comparison takes two different runs or more; {_two_runs()}')
    return list(found.values())


def _two_runs() -> str:
    there = _runs_in(Path("runs"))[:2]
    return f'try RUNS="{" ".join(there)}"' if len(there) == 2 else "try: make train RUN=another"


def _runs_in(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"*/{rundir.MANIFEST}"))


def read_runs(paths: list[Path]) -> list[Run]:
    """Read the folders; raises `UserError` with every one that is no run, or has not made a step."""
    names = [path.resolve().name for path in paths]
    runs: list[Run] = []
    faults: list[str] = []
    for path, name in zip(paths, names, strict=True):
        try:
            runs.append(_read_run(path, name if names.count(name) == 1 else str(path)))
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    return runs


def _read_run(path: Path, name: str) -> Run:
    if not (path / rundir.MANIFEST).is_file():
        others = _runs_in(path.parent)
        hint = nearest(path.name, others) if others else "try: make train"
        raise UserError(f"{path}: no such run; {hint}")
    manifest = rundir.read_manifest(path)
    try:
        metrics = read_metrics(path)
    except FileNotFoundError:
        metrics = []
    if not metrics:
        raise UserError(f"{path}: no step done yet ({manifest['state']}); try again after its first, or without it")
    return Run(path, name, manifest, metrics, read_evaluations(path), _read_measured(path / "eval.json"))


def _read_measured(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["tuned"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; try: rm {path}") from None


def show(console: Console, runs: list[Run]) -> None:
    """The table: a row a run; a column a run where the terminal is too narrow for that."""
    grid = [HEADER, *(cells(run) for run in runs)]
    table = _table(grid, NUM_WORDS)
    if console.measure(table, options=console.options.update(width=PIPE_WIDTH)).maximum > console.width:
        header = tuple(name.replace("\n", " ") for name in HEADER)
        table = _table(list(zip(header, *grid[1:], strict=True)), 1)
    console.print(table)


def _table(grid: list[tuple[str, ...]], num_words: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, title in enumerate(grid[0]):
        table.add_column(title, justify="left" if number < num_words else "right", overflow="fold")
    for row in grid[1:]:
        table.add_row(*row)
    return table


def cells(run: Run) -> tuple[str, ...]:
    """The row of a run."""
    training, last = run.manifest["training"], run.last
    state = "" if run.is_finished else f"\n{run.manifest['state']}, step {run.metrics[-1]['step']}/{training['steps']}"
    return (
        run.name + state,
        run.manifest["config"]["adapter"]["method"],
        Path(run.manifest["base"]["name"]).name,
        f"{training['trained_parameters']:,}",
        length(run),
        f"{sum(record['tokens'] for record in run.metrics):,}",
        str(timedelta(seconds=round(run.seconds))),
        f"{last['loss']:.4f}" if last else NOTHING,
        f"{last['perplexity']:.4g}" if last else NOTHING,
        exact_match(run),
    )


def length(run: Run) -> str:
    """How much it learns from: examples x epochs, or its steps where these were limited."""
    config, training = run.manifest["config"], run.manifest["training"]
    if config["optim"]["max_steps"] == training["steps"]:
        return f"{training['steps']} steps of {config['batch']['size']}"
    return f"{training['train_examples']} x {config['optim']['epochs']:g}"


def exact_match(run: Run) -> str:
    """The share of right answers and how many were asked: of `make eval`, else of the newest evaluation."""
    share, answers = run.last.get("exact_match"), run.last.get("answers")
    if run.measured:
        share, answers = run.measured["exact_match"], len(run.measured["samples"])
    return NOTHING if share is None else f"{share:.1%} of {answers}"


def warnings(runs: list[Run]) -> list[str]:
    """Why the losses of these runs cannot be compared, a line a reason."""
    told = []
    if len({run.manifest["base"]["digest"] for run in runs}) > 1:
        bases = _distinct(run.manifest["base"]["name"] for run in runs)
        told.append(f"warning: not the same base ({bases}), so their losses are not comparable")
    if len({run.manifest["data"] for run in runs}) > 1:
        options = differing_options(runs)
        differ = "; ".join(f"data.{name}: {values}" for name, values in options.items()) or "it changed in between"
        if set(options) == {"limit"}:
            # The limit cuts the training split alone.
            told.append(f"warning: not as much data ({differ}): compare the held-out losses, not those of training")
        else:
            told.append(f"warning: not the same data ({differ}), so their losses are not comparable")
    return told


def differing_options(runs: list[Run]) -> dict[str, str]:
    """The options of `data` that are not the same in all runs, with their values."""
    sections = [run.manifest["config"]["data"] for run in runs]
    values = {name: _distinct(section.get(name) for section in sections) for name in sections[0]}
    return {name: told for name, told in values.items() if any(s.get(name) != sections[0][name] for s in sections)}


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys("none" if value is None else str(value) for value in values))


def notes(runs: list[Run]) -> list[str]:
    """Where a figure is of less than the whole held-out split, a line a run."""
    return [
        f"note: {run.name} is measured on {run.last['examples']} of its {held_out} held-out examples, "
        f"at step {run.last['step']}"
        for run in runs
        if run.last and run.last["examples"] < (held_out := run.manifest["training"]["held_out_examples"])
    ]


def points(run: Run) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(tokens seen, loss) of the training batches, and of the held-out examples."""
    tokens = run.tokens
    # A crash may leave an evaluation whose step was never written down.
    held_out = [record for record in run.evaluations if record["step"] in tokens]
    training, measured = ([(tokens[r["step"]], r["loss"]) for r in records] for records in (run.metrics, held_out))
    return training, measured


def next_step(runs: list[Run]) -> str:
    """The command that tells more: measure what was not measured, else talk to the best."""
    finished = [run for run in runs if run.is_finished]
    if not finished:
        return "the same again, once they have gone on"
    if unmeasured := [run for run in finished if not run.measured]:
        return f"make eval{rundir.make_argument(unmeasured[0].path)}"
    return f"make chat{rundir.make_argument(min(finished, key=lambda run: run.last['loss']).path)}"
