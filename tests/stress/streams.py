"""Good clients in a process of their own: each asks its questions again and again, and looks at what it gets."""

import asyncio
import contextlib
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from typing import Any

from bench.daemon import pieces
from serve.client import Client, connect
from serve.pieces import Delta
from serve.runtime import Record
from serve.submission import Submission


@dataclass
class Seen:
    """Results of the good clients: answers by the moment each ended, those that differ from the solo ones, faults of the clients themselves.

    `words` are (moment, seconds since the words before of the same answer). All is there when they have left, `num_ended` always.
    """

    ends: list[float] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    words: list[tuple[float, float]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    counter: Any = None

    @property
    def num_ended(self) -> int:
        """Answers that have ended so far."""
        return int(self.counter.value)

    def between(self, begun: float = 0.0, ended: float = math.inf) -> tuple[int, list[float]]:
        """(how many answers ended, the seconds between words) in this time."""
        gaps = [seconds for moment, seconds in self.words if begun < moment < ended]
        return sum(begun < moment < ended for moment in self.ends), gaps


async def answer(client: Client, submission: Submission) -> str:
    """The whole text of an answer."""
    return "".join([piece.text async for piece in pieces(client, submission) if isinstance(piece, Delta)])


def solo(record: Record, submissions: Sequence[Submission]) -> list[str]:
    """The answers one after another, by one client that is alone."""

    async def ask_all() -> list[str]:
        with await connect(record) as client:
            return [await answer(client, submission) for submission in submissions]

    return asyncio.run(ask_all())


@contextlib.contextmanager
def streaming(record: Record, submissions: Sequence[Submission], expected: Sequence[str]) -> Iterator[Seen]:
    """One client for each question, from now to the end of the block; what they have seen is there after it."""
    spawn = multiprocessing.get_context("spawn")
    stop, results, seen = spawn.Event(), spawn.SimpleQueue(), Seen(counter=spawn.Value("i"))
    arguments = (record, list(submissions), list(expected), stop, results, seen.counter)
    process = spawn.Process(target=_run, args=arguments, daemon=True)
    process.start()
    try:
        # They are connected and have read their first words.
        results.get()
        yield seen
    finally:
        stop.set()
        seen.ends, seen.wrong, seen.words, seen.faults = results.get()
        process.join()


def _run(
    record: Record, submissions: list[Submission], expected: list[str], stop: Event, results: Any, counter: Any
) -> None:
    seen, begun = Seen(), set[int]()

    async def client_of(number: int) -> None:
        with await connect(record) as client:
            while not stop.is_set():
                words, last = [], None
                async for piece in pieces(client, submissions[number]):
                    if isinstance(piece, Delta):
                        now = time.monotonic()
                        seen.words += [] if last is None else [(now, now - last)]
                        words.append(piece.text)
                        begun.add(number)
                        last = now
                seen.ends.append(time.monotonic())
                counter.value += 1
                if "".join(words) != expected[number]:
                    seen.wrong.append((expected[number], "".join(words)))

    async def all_clients() -> None:
        tasks = [asyncio.create_task(client_of(n)) for n in range(len(submissions))]
        while len(begun) < len(tasks) and not any(task.done() for task in tasks):
            await asyncio.sleep(0.02)
        results.put(None)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            seen.faults += [repr(result)] if isinstance(result, BaseException) else []

    asyncio.run(all_clients())
    results.put((seen.ends, seen.wrong, seen.words, seen.faults))
