"""Good clients in a process of their own: each asks its questions again and again, and looks at what it gets."""

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from typing import Any

from bench.serving import answer, pieces
from serve.client import connect
from serve.engine import Sampling
from serve.pieces import Delta
from serve.runtime import Record
from serve.submission import Submission

TOPICS = (
    "a lighthouse keeper and a fox", "how bread rises", "the first train across the mountains", "a café that never closes", "why the sea is salt",
    "two old friends who meet again", "a garden on the moon", "the history of paper", "a clock that runs backwards", "how bees find their way",
    "a storm over the harbour", "the life of a small bookshop", "why we dream", "an island without shadows", "the longest winter", "a letter lost",
)  # fmt: skip


@dataclass
class Seen:
    """What the good clients got: answers, how many differed from the solo ones, seconds between the words of one answer."""

    answers: int = 0
    wrong: list[tuple[str, str]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def questions(number: int, max_tokens: int = 48, first: int = 0, **more: Any) -> list[Submission]:
    """So many different questions, numbered from `first`, every second one with temperature and a seed."""
    made = []
    for n in range(first, first + number):
        text = f"Write a long story (number {n}, ñ 🦊) about {TOPICS[n % len(TOPICS)]}."
        sampling = Sampling(temperature=0.8, seed=n) if n % 2 else Sampling()
        made.append(Submission([{"role": "user", "content": text}], sampling, max_tokens, **more))
    return made


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
    stop, results, seen = spawn.Event(), spawn.SimpleQueue(), Seen()
    process = spawn.Process(target=_run, args=(record, list(submissions), list(expected), stop, results), daemon=True)
    process.start()
    try:
        # They are connected and have read their first words.
        results.get()
        yield seen
    finally:
        stop.set()
        vars(seen).update(vars(results.get()))
        process.join()


def _run(record: Record, submissions: list[Submission], expected: list[str], stop: Event, results: Any) -> None:
    seen = Seen()

    async def client_of(number: int) -> None:
        with await connect(record) as client:
            while not stop.is_set():
                words, last = [], None
                async for piece in pieces(client, submissions[number]):
                    if isinstance(piece, Delta):
                        now = time.monotonic()
                        seen.gaps += [] if last is None else [now - last]
                        words.append(piece.text)
                        last = now
                seen.answers += 1
                if "".join(words) != expected[number]:
                    seen.wrong.append((expected[number], "".join(words)))

    async def all_clients() -> None:
        tasks = [asyncio.create_task(client_of(n)) for n in range(len(submissions))]
        await asyncio.sleep(1.0)
        results.put(None)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            seen.faults += [repr(result)] if isinstance(result, BaseException) else []

    asyncio.run(all_clients())
    results.put(seen)
