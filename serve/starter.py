"""Find the daemon that a client shall talk to, or start one."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from serve import runtime
from serve.arguments import Arguments, require_finished
from serve.errors import NoDaemonError, ServeError, UserError
from serve.lifeline import child_environment

PUBLISH_SECONDS = 20.0


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
    with open(_log_path(folder, arguments), "wb", opener=_private) as log:
        return subprocess.Popen(
            [sys.executable, "-m", "serve", "daemon", *arguments.words()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=child_environment() if is_child else None,
        )


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
            lines = _log_path(folder, arguments).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            failure = ServeError(lines[-1].removeprefix("error: ") if lines else "the daemon left without a word")
            failure.exit_code = process.returncode
            raise failure
        await asyncio.sleep(0.02)
    raise NoDaemonError(f"the daemon does not come up; see {_log_path(folder, arguments)}")


def _log_path(folder: Path, arguments: Arguments) -> Path:
    return folder / f"{arguments.name}.log"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
