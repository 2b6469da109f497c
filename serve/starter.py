"""Find the daemon that a client shall talk to, or start one."""

import asyncio
import atexit
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from serve import runtime
from serve.arguments import Arguments, parse, require_finished
from serve.errors import NoDaemonError, ServeError, UserError
from serve.lifeline import PARENT, child_environment

COMMAND = (sys.executable, "-m", "serve", "daemon")
PUBLISH_SECONDS = 20.0
END_SECONDS = 10.0
GONE_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Origin:
    """How a daemon was started by `start`: with these `arguments`; as a child it ends with this process."""

    arguments: Arguments
    is_child: bool

    def holding(self, hold: str) -> "Origin":
        """The same with another HOLD."""
        return replace(self, arguments=replace(self.arguments, hold=hold))


def find(folder: Path, arguments: Arguments) -> runtime.Record | None:
    """The live daemon of the named run, or the only one where none was named; raises `UserError` if several are."""
    records = runtime.find_all(folder)
    if not arguments.run:
        if len(records) > 1:
            runs = ", ".join(run for record in records for run in (record.run, *record.runs[1:]))
            raise UserError(f"several runs are served: {runs}; try RUN={records[0].run}")
        return records[0] if records else None
    wanted = Path(arguments.run).absolute()
    for record in records:
        if wanted in (Path(run).absolute() for run in record.runs):
            return record
    for record in records:
        if record.name == arguments.name:
            # Names of daemons are names of folders; `runs/x` and `old/x` cannot be served at the same time.
            raise UserError(f"{record.name} means {record.run} now (process {record.pid}); try RUN={record.run}")
    return None


def require_unserved(folder: Path, arguments: Arguments) -> None:
    """Raise `UserError` if a daemon serves one of the runs already, alone or among others."""
    for run in arguments.runs:
        record = find(folder, replace(arguments, run=run))
        if record is not None:
            raise UserError(f"{run} is already served by process {record.pid}; try: make chat RUN={run}")


def adapter_of(record: runtime.Record, arguments: Arguments) -> str:
    """Who shall answer: ADAPTER, or the named run where a daemon serves several; "" leaves it to the daemon."""
    if not arguments.adapter and arguments.run and len(record.runs) > 1:
        return arguments.name
    return arguments.adapter


def find_or_fail(folder: Path, arguments: Arguments) -> runtime.Record:
    """Like `find`; raises `NoDaemonError` where it would return None."""
    record = find(folder, arguments)
    if record is not None:
        return record
    if not arguments.run:
        raise NoDaemonError("no run is served; try: make serve RUN=runs/x")
    require_finished(arguments)
    raise NoDaemonError(f"no daemon serves {arguments.run}; try: make serve RUN={arguments.run}")


def start(folder: Path, arguments: Arguments, *, is_child: bool) -> subprocess.Popen[bytes]:
    """Start a daemon in its own session, so that Ctrl-C here is not for it; a child ends when this process does."""
    with open(_log_path(folder, arguments.name), "wb", opener=_private) as log:
        process = subprocess.Popen(
            [*COMMAND, *arguments.words()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=child_environment() if is_child else None,
        )
    if is_child:
        # The kernel would see to it, but not wait for it.
        atexit.register(end, process, END_SECONDS)
    return process


def origin(folder: Path, record: runtime.Record) -> Origin | None:
    """How a daemon was started, as the kernel knows it; None if it was not by `start`, or ends with another process.

    So is one on another machine, or in the foreground, where a terminal or a program looks after it.
    """
    process = Path(f"/proc/{record.pid}")
    try:
        is_background = (process / "fd" / "1").samefile(_log_path(folder, record.name))
        parents = [word for word in _strings(process / "environ") if word.startswith(f"{PARENT}=")]
        arguments = parse("daemon", _strings(process / "cmdline")[len(COMMAND) :])
    except (OSError, UserError):
        return None
    if not is_background or parents not in ([], [f"{PARENT}={os.getpid()}"]):
        return None
    # It may have been started in another folder.
    runs = tuple(
        given if Path(given).absolute() == Path(run) else run
        for given, run in zip(arguments.runs, record.runs, strict=True)
    )
    return Origin(replace(arguments, run=runs[0], runs=runs), is_child=bool(parents))


async def find_or_start(folder: Path, origin: Origin) -> runtime.Record:
    """The daemon of these runs, started in this way if there is none; raises like `wait_until_published`."""
    record = find(folder, origin.arguments)
    if record is None:
        process = start(folder, origin.arguments, is_child=origin.is_child)
        record = await wait_until_published(folder, origin.arguments, process)
    return record


async def wait_until_gone(record: runtime.Record) -> None:
    """Return when that daemon has ended."""
    while record.is_alive:
        await asyncio.sleep(GONE_POLL_SECONDS)


def end(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """End a daemon that was started here: with a signal, and with force if it has not left after so long."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def wait_until_published(folder: Path, arguments: Arguments, process: subprocess.Popen[bytes]) -> runtime.Record:
    """The record of the daemon just started; raises with the line it left and its exit code if it failed."""
    for _ in range(int(PUBLISH_SECONDS / 0.02)):
        if (record := runtime.find(folder, arguments.name)) is not None and record.pid == process.pid:
            return record
        if process.poll() is not None:
            lines = _log_path(folder, arguments.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            failure = ServeError(lines[-1].removeprefix("error: ") if lines else "the daemon left without a word")
            failure.exit_code = process.returncode
            raise failure
        await asyncio.sleep(0.02)
    raise NoDaemonError(f"the daemon does not come up; see {_log_path(folder, arguments.name)}")


def _strings(path: Path) -> list[str]:
    """What the kernel lists of a process, each with a NUL behind it."""
    return os.fsdecode(path.read_bytes()).split("\0")[:-1]


def _log_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
