"""What the benchmarks and trials of serving begin with: a daemon of their own, its memory and handles, and tables."""

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve import runtime, starter
from serve.client import Client
from serve.errors import RequestError
from serve.lifeline import child_environment
from serve.pieces import Delta
from serve.submission import Submission

START_S = 300.0
STOP_S = 30.0


@dataclass
class Served:
    """A daemon in a runtime directory of its own; what it says goes to `log`."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    record: runtime.Record

    @property
    def pids(self) -> list[int]:
        """The daemon and its engine processes."""
        pid = self.record.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    @property
    def environment(self) -> dict[str, str]:
        """For a client program."""
        return {**os.environ, "AFINAR_RUNTIME_DIR": str(self.folder)}

    def said(self) -> str:
        """What the daemon and its engines wrote, the end of it."""
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))


@contextlib.contextmanager
def served(*words: str, delay: float = 0.0) -> Iterator[Served]:
    """`python -m serve daemon WORDS`, published and perhaps still loading; ended at the end. `delay`: see `serve.echo`."""
    # Short: a socket's path is.
    with tempfile.TemporaryDirectory(prefix="af-", dir="/tmp") as name:
        folder = Path(name)
        # It leaves when this process does, however that ends.
        environment = {**child_environment(), "AFINAR_RUNTIME_DIR": name, "AFINAR_ECHO_DELAY": str(delay)}
        with (folder / "daemon.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "serve", "daemon", *words],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            yield Served(process, folder, _published(process, folder))
        finally:
            starter.end(process, STOP_S)


def _published(process: "subprocess.Popen[bytes]", folder: Path) -> runtime.Record:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if records := runtime.find_all(folder):
            return records[0]
        time.sleep(0.02)
    raise AssertionError((folder / "daemon.log").read_text())


def num_handles(pid: int) -> int:
    """Open files and sockets of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def processor_s(pid: int) -> tuple[float, float]:
    """Seconds that the main thread of a process has run, and that it has waited for a processor to run on (Linux)."""
    ran, waited, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    return int(ran) / 1e9, int(waited) / 1e9


async def pieces(client: Client, submission: Submission) -> AsyncIterator[Any]:
    """The answer in pieces, `Delta`s and last a `Done`; a full queue is tried again when the daemon says so."""
    options = {f.name: getattr(submission, f.name) for f in dataclasses.fields(submission)}
    while True:
        try:
            async for piece in client.ask(**options):
                yield piece
            return
        except RequestError as refusal:
            if refusal.code != "E_QUEUE_FULL":
                raise
            await asyncio.sleep(refusal.detail["retry_after_ms"] / 1e3)


async def answer(client: Client, submission: Submission) -> str:
    """The whole text of an answer."""
    return "".join([piece.text async for piece in pieces(client, submission) if isinstance(piece, Delta)])


def chosen(args: Sequence[str], **defaults: str) -> tuple[dict[str, str], list[str]]:
    """(`NAME=value` words of a benchmark itself, with these defaults; all other words, for the daemon)."""
    own, others = dict(defaults), []
    for word in args:
        name, _, value = word.partition("=")
        if name in defaults:
            own[name] = value
        else:
            others.append(word)
    return own, others


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Plain columns under their heads, numbers to the right."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
