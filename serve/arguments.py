"""The words of the command line, `NAME=value` and `serve.name=value`, and the runs they mean.

Standard library only: `make` runs this file with the system's Python before it sets anything up.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve import runs, settings
from serve.chat import flags
from serve.errors import ServeError, UserError, nearest, report
from serve.settings import Settings

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
    `system` is the text before the conversation, `sampling` what `serve.chat.sampling` makes of `--set`, `files` are the
    paths of texts that go in front of the question; `is_json`: answer as objects, one a line.
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
    system: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    is_json: bool = False
    settings: Settings = field(default_factory=Settings)

    @property
    def name(self) -> str:
        """The last part of the run folder: what clients know it by."""
        return Path(self.run).name

    def words(self) -> list[str]:
        """The words that make a daemon serve this."""
        served = f"RUNS={' '.join(self.runs)}" if len(self.runs) > 1 else f"RUN={self.run}"
        words = [served, f"HOLD={self.hold}", f"DTYPE={self.dtype}", f"NGPU={self.num_gpus}"]
        if self.listen:
            words.append(f"LISTEN={self.listen}")
        if self.metrics:
            words.append(f"METRICS={self.metrics}")
        return words + self.settings.words()


def parse(command: str, words: list[str]) -> Arguments:
    """Read the words after a command; raises `UserError`. An empty value is a variable that was not set."""
    given = flags.split(words) if command in flags.COMMANDS else flags.Flags(tuple(words))
    values, options = _split(command, given.words)
    start = values.get("START") == "yes"
    if command == "chat" and not start and (lost := [*values.keys() & {"HOLD", "DTYPE", "NGPU"}, *options]):
        raise UserError(f"{min(lost)} matters when a daemon starts, and none would; try START=yes")
    _check_together(values)
    hold = values.get("HOLD", "auto")
    folders = _folders(values, "echo" if hold == "echo" and "RUNS" not in values else "")
    if len(folders) > 1 and hold == "merged":
        raise UserError("HOLD=merged: one run only can be merged into its base; try HOLD=adapters")
    return Arguments(
        run=folders[0] if folders else "",
        runs=folders,
        hold=hold,
        dtype=values.get("DTYPE", "auto"),
        start=start,
        num_gpus=int(values.get("NGPU", "1")),
        listen=values.get("LISTEN", ""),
        metrics=int(values.get("METRICS", "0")),
        adapter=values.get("ADAPTER", ""),
        connect=values.get("CONNECT", ""),
        system=given.system,
        sampling=given.sampling,
        files=given.files,
        is_json=given.is_json,
        settings=settings.parse(options),
    )


def _split(command: str, words: Iterable[str]) -> tuple[dict[str, str], list[str]]:
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


def _check_adapter(value: str) -> str:
    return "" if flags.is_text(value) else "not UTF-8; try make status for the names"


CHECKS: dict[str, Callable[[str], str]] = {
    "NGPU": _check_gpus,
    "METRICS": _check_metrics,
    "LISTEN": _check_address,
    "CONNECT": _check_address,
    "ADAPTER": _check_adapter,
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


def _folders(values: dict[str, str], default: str) -> tuple[str, ...]:
    """The folders that were named, each once, each with a name of its own: clients call an adapter by it."""
    given = values["RUNS"].split() if "RUNS" in values else [values.get("RUN", default)]
    folders = [runs.locate(run) for run in given if run]
    paths: dict[str, str] = {}
    for folder in folders:
        name = Path(folder).name
        if name in paths:
            same = "named twice" if Path(paths[name]).absolute() == Path(folder).absolute() else "two runs of that name"
            raise UserError(f"RUNS: {folder}: {same}; try another run, or rename one of the folders")
        paths[name] = folder
    return tuple(folders)


def require_finished(arguments: Arguments) -> Arguments:
    """The same with runs that can be served, the only one there is if none was named; raises `UserError`."""
    if arguments.hold == "echo":
        return arguments
    if not arguments.run:
        run = runs.only_run()
        return dataclasses.replace(arguments, run=run, runs=(run,))
    for run in arguments.runs or (arguments.run,):
        runs.check_finished(run)
    return arguments


def main(command: str, *words: str) -> None:
    """Check only; prints nothing when all is well."""
    arguments = parse(command, list(words))
    if command in ("daemon", "infer"):
        require_finished(arguments)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ServeError as error:
        report(error)
        sys.exit(error.exit_code)
