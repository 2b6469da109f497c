"""A daemon of one's own for benchmarks and stress programs, questions for it, and tables."""

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
from serve.engine import Sampling
from serve.errors import RequestError
from serve.lifeline import child_environment
from serve.submission import Submission

START_S = 300.0
STOP_S = 30.0
TOPICS = (
    "a lighthouse keeper and a fox", "how bread rises", "the first train across the mountains", "a café that never closes", "why the sea is salt",
    "two old friends who meet again", "a garden on the moon", "the history of paper", "a clock that runs backwards", "how bees find their way",
    "a storm over the harbour", "the life of a small bookshop", "why we dream", "an island without shadows", "the longest winter", "a letter lost",
)  # fmt: skip


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
        """The end of what the daemon and its engines wrote."""
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


def questions(number: int, max_tokens: int = 48, first: int = 0, **more: Any) -> list[Submission]:
    """So many different questions, numbered from `first`, every second one with temperature and a seed."""
    made = []
    for n in range(first, first + number):
        text = f"Write a long story (number {n}, ñ 🦊) about {TOPICS[n % len(TOPICS)]}."
        sampling = Sampling(temperature=0.8, seed=n) if n % 2 else Sampling()
        made.append(Submission([{"role": "user", "content": text}], sampling, max_tokens, **more))
    return made


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
