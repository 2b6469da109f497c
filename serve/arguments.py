"""The words of the command line, `NAME=value` each, and the run they mean. Torch-free: mistakes cost no time."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from serve.errors import UserError, nearest

RUNS = Path("runs")
CHOICES = {
    "HOLD": ("auto", "merged", "4bit", "adapters", "echo"),
    "DTYPE": ("auto", "bf16", "fp32"),
    "START": ("yes", "no"),
}
NAMES = {
    "daemon": ("RUN", "HOLD", "DTYPE"),
    "chat": ("RUN", "HOLD", "DTYPE", "START"),
    "infer": ("RUN", "HOLD", "DTYPE"),
}


@dataclass(frozen=True)
class Arguments:
    """What to serve or to talk to. `run` is a folder, "" where none was named; `name` is what clients know it by."""

    run: str = ""
    hold: str = "auto"
    dtype: str = "auto"
    start: bool = False

    @property
    def name(self) -> str:
        """The last part of the run folder."""
        return Path(self.run).name

    def words(self) -> list[str]:
        """The words that make a daemon serve this."""
        return [f"RUN={self.run}", f"HOLD={self.hold}", f"DTYPE={self.dtype}"]


def parse(command: str, words: list[str]) -> Arguments:
    """Read `NAME=value` words; raises `UserError`. An empty value is a variable that was not set."""
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in NAMES[command]:
            raise UserError(f"{word}: unknown; {nearest(name, NAMES[command])} Try: {_example(command)}")
        if value and name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"{word}: {nearest(value, CHOICES[name])} Try {name}={CHOICES[name][0]}")
        if value:
            values[name] = value
    start = values.get("START") == "yes"
    if command == "chat" and not start and (lost := values.keys() & {"HOLD", "DTYPE"}):
        raise UserError(f"{min(lost)} matters when a daemon starts, and none would; try START=yes")
    hold = values.get("HOLD", "auto")
    if hold == "echo":
        values.setdefault("RUN", "echo")
    run = locate(values["RUN"]) if "RUN" in values else ""
    return Arguments(run, hold, values.get("DTYPE", "auto"), start)


def locate(run: str) -> str:
    """A folder as it was given; a bare name means `runs/<name>`, unless only the current folder has it."""
    path = Path(run.rstrip("/") or run)
    is_bare = len(path.parts) == 1 and run == path.name
    if is_bare and ((RUNS / path).exists() or not path.exists()):
        path = RUNS / path
    return str(path) if path.name else str(path.resolve())


def require_finished(arguments: Arguments) -> Arguments:
    """The same with a run that can be served, the only one there is if none was named; raises `UserError`."""
    if arguments.hold == "echo":
        return arguments
    if not arguments.run:
        return Arguments(_only_run(), arguments.hold, arguments.dtype, arguments.start)
    manifest = Path(arguments.run) / "run.json"
    if not manifest.is_file():
        others = finished_runs(Path(arguments.run).parent)
        hint = f"{nearest(arguments.run, others)} Or train one: make train" if others else "train it first: make train"
        raise UserError(f"{arguments.run} is not a run; {hint}")
    fields = _read(manifest)
    if fields.get("state") != "finished":
        again = (
            f"finish it with: {fields['command']}   or begin another: " if "command" in fields else "finish it with: "
        )
        raise UserError(
            f"{arguments.run} is not finished ({fields.get('state', 'no run.json to read')}); {again}make train"
        )
    return arguments


def finished_runs(folder: Path) -> list[str]:
    """The runs in a folder that can be served."""
    manifests = sorted(folder.glob("*/run.json"))
    return [str(path.parent) for path in manifests if _read(path).get("state") == "finished"]


def _only_run() -> str:
    runs = finished_runs(RUNS)
    if not runs:
        raise UserError(f"there is no finished run in {RUNS}{os.sep} yet; train one: make train")
    if len(runs) > 1:
        raise UserError(f"which run? Try RUN={runs[0]}; there are: {', '.join(runs)}")
    return runs[0]


def _read(manifest: Path) -> dict[str, str]:
    try:
        fields = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _example(command: str) -> str:
    return {"daemon": "make serve RUN=runs/x", "chat": "make chat RUN=runs/x", "infer": "make infer RUN=runs/x"}[
        command
    ]
