"""The words of the command line, `NAME=value` and `serve.name=value`, and the runs they mean.

Standard library only: `make` runs this file with the system's Python before it sets anything up.
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from serve import settings
from serve.errors import ServeError, UserError, nearest
from serve.settings import Settings

RUNS = Path("runs")
MAX_PORT = 65535
MAX_ENGINES = 64
CHOICES = {
    "HOLD": ("auto", "merged", "4bit", "adapters", "echo"),
    "DTYPE": ("auto", "bf16", "fp32"),
    "START": ("yes", "no"),
}
NAMES = {
    "daemon": ("RUN", "RUNS", "HOLD", "DTYPE", "NGPU", "LISTEN", "METRICS"),
    "chat": ("RUN", "HOLD", "DTYPE", "NGPU", "START", "ADAPTER", "CONNECT"),
    "infer": ("RUN", "RUNS", "HOLD", "DTYPE", "NGPU", "METRICS", "ADAPTER"),
    "status": ("RUN", "CONNECT"),
    "load": ("RUN", "ADAPTER"),
    "unload": ("RUN", "ADAPTER"),
    "stop": ("RUN",),
    "keys": (),
}
EXAMPLES = {
    "daemon": "make serve RUN=runs/x",
    "chat": "make chat RUN=runs/x",
    "infer": "make infer RUN=runs/x",
    "status": "make status",
    "load": "make load ADAPTER=runs/x",
    "unload": "make unload ADAPTER=x",
    "stop": "make stop",
    "keys": "make keys",
}


@dataclass(frozen=True)
class Arguments:
    """What to serve or to talk to. `run` is a folder, the first of `runs`; both are empty where none was named.

    `listen` and `connect` are `host:port`, "" for this user on this machine only; control is at the next port.
    `metrics` is a port of the loopback, 0 for none; `adapter` who answers, "" for the first that is served.
    """

    run: str = ""
    runs: tuple[str, ...] = ()
    hold: str = "auto"
    dtype: str = "auto"
    start: bool = False
    num_gpus: int = 1
    listen: str = ""
    metrics: int = 0
    adapter: str = ""
    connect: str = ""
    settings: Settings = field(default_factory=Settings)

    @property
    def name(self) -> str:
        """The last part of the run folder: what clients know it by."""
        return Path(self.run).name

    def words(self) -> list[str]:
        """The words that make a daemon serve this."""
        runs = f"RUNS={' '.join(self.runs)}" if len(self.runs) > 1 else f"RUN={self.run}"
        words = [runs, f"HOLD={self.hold}", f"DTYPE={self.dtype}", f"NGPU={self.num_gpus}"]
        if self.listen:
            words.append(f"LISTEN={self.listen}")
        if self.metrics:
            words.append(f"METRICS={self.metrics}")
        return words + self.settings.words()


def parse(command: str, words: list[str]) -> Arguments:
    """Read the words after a command; raises `UserError`. An empty value is a variable that was not set."""
    values, options = _split(command, words)
    start = values.get("START") == "yes"
    if command == "chat" and not start and (lost := [*values.keys() & {"HOLD", "DTYPE", "NGPU"}, *options]):
        raise UserError(f"{min(lost)} matters when a daemon starts, and none would; try START=yes")
    _check_together(values)
    hold = values.get("HOLD", "auto")
    runs = _runs(values, "echo" if hold == "echo" and "RUNS" not in values else "")
    if len(runs) > 1 and hold == "merged":
        raise UserError("HOLD=merged: one run only can be merged into its base; try HOLD=adapters")
    return Arguments(
        run=runs[0] if runs else "",
        runs=runs,
        hold=hold,
        dtype=values.get("DTYPE", "auto"),
        start=start,
        num_gpus=int(values.get("NGPU", "1")),
        listen=values.get("LISTEN", ""),
        metrics=int(values.get("METRICS", "0")),
        adapter=values.get("ADAPTER", ""),
        connect=values.get("CONNECT", ""),
        settings=settings.parse(options),
    )


def _split(command: str, words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The variables that were set, each checked, and the options as they were given."""
    values: dict[str, str] = {}
    options: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name.startswith(settings.PREFIX) and "HOLD" in NAMES[command]:
            options.append(word)
        elif not equals or name not in NAMES[command]:
            hint = nearest(name, NAMES[command]) + " " if NAMES[command] else ""
            raise UserError(f"{word}: unknown; {hint}Try: {EXAMPLES[command]}")
        elif value:
            if fault := _fault(name, value):
                raise UserError(f"{word}: {fault}")
            values[name] = value
    return values, options


def split_address(address: str) -> tuple[str, int]:
    """`host:port` in two; an address of IPv6 stands in brackets, `*` means every one of IPv4. Raises `ValueError`."""
    match = re.fullmatch(r"(\*|[\w.-]+|\[[\da-fA-F:.]+(?:%\w+)?\]):([0-9]{1,5})", address, re.ASCII)
    if match is None or not 1 <= int(match[2]) < MAX_PORT:
        raise ValueError(address)
    return "0.0.0.0" if match[1] == "*" else match[1].strip("[]"), int(match[2])


def _fault(name: str, value: str) -> str:
    """What is wrong with the value of a variable, "" if nothing is."""
    if name in CHOICES and value not in CHOICES[name]:
        return f"{nearest(value, CHOICES[name])} Try {name}={CHOICES[name][0]}"
    return CHECKS[name](value) if name in CHECKS else ""


def _check_gpus(value: str) -> str:
    is_valid = re.fullmatch(r"[1-9][0-9]?", value) and int(value) <= MAX_ENGINES
    return "" if is_valid else f"must be a whole number of GPUs from 1 to {MAX_ENGINES}; try NGPU=1"


def _check_metrics(value: str) -> str:
    is_valid = re.fullmatch(r"[1-9][0-9]{0,4}", value) and int(value) <= MAX_PORT
    return "" if is_valid else f"must be a port from 1 to {MAX_PORT}; try METRICS=9100"


def _check_address(value: str) -> str:
    try:
        split_address(value)
    except ValueError:
        return f"must be host:port, with a port from 1 to {MAX_PORT - 1}; try 127.0.0.1:5555"
    return ""


CHECKS: dict[str, Callable[[str], str]] = {
    "NGPU": _check_gpus,
    "METRICS": _check_metrics,
    "LISTEN": _check_address,
    "CONNECT": _check_address,
}


def _check_together(values: dict[str, str]) -> None:
    if "RUN" in values and "RUNS" in values:
        raise UserError(f'RUN and RUNS: say one of them; try RUNS="{values["RUN"]} {values["RUNS"]}"')
    if "CONNECT" in values and (local := values.keys() & {"RUN", "START", "HOLD", "DTYPE", "NGPU"}):
        raise UserError(
            f"{min(local)} is about a daemon here, CONNECT about one elsewhere; try ADAPTER= beside CONNECT"
        )
    if "LISTEN" in values and "METRICS" in values:
        port = split_address(values["LISTEN"])[1]
        if int(values["METRICS"]) in (port, port + 1):
            raise UserError(f"METRICS={values['METRICS']}: LISTEN takes {port} and {port + 1}; try METRICS={port - 1}")


def _runs(values: dict[str, str], default: str) -> tuple[str, ...]:
    """The folders that were named, each once, each with a name of its own: clients call an adapter by it."""
    given = values["RUNS"].split() if "RUNS" in values else [values.get("RUN", default)]
    runs = [locate(run) for run in given if run]
    paths: dict[str, str] = {}
    for run in runs:
        name = Path(run).name
        if name in paths:
            same = "named twice" if Path(paths[name]).absolute() == Path(run).absolute() else "two runs of that name"
            raise UserError(f"RUNS: {run}: {same}; try another run, or rename one of the folders")
        if name == "base" and len(runs) > 1:
            raise UserError(f"RUNS: {run}: base is what the model without an adapter is called; rename the folder")
        paths[name] = run
    return tuple(runs)


def locate(run: str) -> str:
    """A folder as it was given; a bare name means `runs/<name>`, unless only the current folder has it."""
    path = Path(run.rstrip("/") or run)
    is_bare = len(path.parts) == 1 and run == path.name
    if is_bare and ((RUNS / path).exists() or not path.exists()):
        path = RUNS / path
    return str(path) if path.name else str(path.resolve())


def require_finished(arguments: Arguments) -> Arguments:
    """The same with runs that can be served, the only one there is if none was named; raises `UserError`."""
    if arguments.hold == "echo":
        return arguments
    if not arguments.run:
        run = _only_run()
        return dataclasses.replace(arguments, run=run, runs=(run,))
    for run in arguments.runs or (arguments.run,):
        check_finished(run)
    return arguments


def check_finished(run: str) -> None:
    """Raise `UserError` unless the folder is a run that can be served."""
    manifest = Path(run) / "run.json"
    if not manifest.is_file():
        others = finished_runs(Path(run).parent)
        hint = f"{nearest(run, others)} Or train one: make train" if others else "train it first: make train"
        raise UserError(f"{run} is not a run; {hint}")
    fields = _read(manifest)
    if fields.get("state") != "finished":
        again = f"{fields['command']}   or begin another: " if "command" in fields else ""
        state = fields.get("state", "no run.json to read")
        raise UserError(f"{run} is not finished ({state}); finish it with: {again}make train")


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


def main(command: str, *words: str) -> None:
    """Check only; prints nothing when all is well."""
    arguments = parse(command, list(words))
    if command in ("daemon", "infer"):
        require_finished(arguments)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
