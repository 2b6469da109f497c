"""What the daemon, the protocol and the client cost over the bare engine, for one stream.

    python -m bench.overhead RUN=runs/x [TOKENS=32] [ROUNDS=9] [HOLD=…] [DTYPE=…] [serve.name=value …]

The same engine twice: in this process, stepped by hand, and behind a real daemon with a real client. They take turns, with the same
question in a round and another one in the next; machines are noisy, so medians of the differences within a round are told.
HOLD=echo measures what is left without a model.
"""

import asyncio
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.daemon import TOPICS, chosen, pieces, served, table
from serve.client import Client, connect
from serve.engine import Engine, Sampling
from serve.engine_process import build
from serve.figures import percentile
from serve.load import Load
from serve.pieces import Delta
from serve.settings import PREFIX
from serve.settings import parse as parse_settings
from serve.submission import Submission

# Threads wait as they do in an engine process of the daemon's; read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@dataclass(frozen=True)
class Times:
    """Seconds: from the question to the first token, and between one token and the next."""

    first: float
    between: list[float]

    @property
    def p50(self) -> float:
        """Of the time between tokens."""
        return percentile(self.between, 50)


def question(number: int) -> list[dict[str, Any]]:
    """A conversation that no engine has read before."""
    return [{"role": "user", "content": f"{number} times: write a long story about {TOPICS[number % len(TOPICS)]}."}]


def bare(engine: Engine, messages: list[dict[str, Any]], num_tokens: int) -> Times:
    """Step the engine by hand."""
    stamps = [time.perf_counter()]
    engine.start(0, engine.prompt_ids(messages), Sampling(), engine.info.adapters[0].key)
    token = None
    while token is None:
        token = engine.prefill([0])[0].token
    stamps.append(time.perf_counter())
    while len(stamps) <= num_tokens and token not in engine.info.stop_ids:
        token = engine.step()[0]
        stamps.append(time.perf_counter())
    engine.free(0)
    return times(stamps)


async def through(client: Client, messages: list[dict[str, Any]], num_tokens: int) -> Times:
    """Ask the daemon; with the ids every token is a message."""
    stamps = [time.perf_counter()]
    async for piece in pieces(client, Submission(messages, max_tokens=num_tokens, wants_ids=True)):
        if isinstance(piece, Delta):
            stamps.append(time.perf_counter())
    return times(stamps)


def times(stamps: Sequence[float]) -> Times:
    """From moments: the question, the tokens."""
    gaps = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    return Times(gaps[0], gaps[1:])


async def measure(engine: Engine, record: Any, rounds: int, num_tokens: int) -> list[tuple[Times, Times]]:
    """(bare, through the daemon) of every round; the first round warms both up and is left out."""
    measured = []
    with await connect(record) as client:
        for number in range(rounds + 1):
            one = bare(engine, question(number), num_tokens)
            measured.append((one, await through(client, question(number), num_tokens)))
    return measured[1:]


def main(args: list[str]) -> int:
    """Measure, and print a table in milliseconds."""
    own, words = chosen(args, TOKENS="32", ROUNDS="9")
    given = dict(word.split("=", 1) for word in words)
    settings = parse_settings([word for word in words if word.startswith(PREFIX)])
    load = Load((given.get("RUN", "echo"),), given.get("HOLD", "auto"), given.get("DTYPE", "auto"), settings)
    engine = build(load, lambda message: None)
    while engine.reserve():
        pass
    with served(*words) as daemon:
        measured = asyncio.run(measure(engine, daemon.record, int(own["ROUNDS"]), int(own["TOKENS"])))
    rows = []
    for name, of in (("between tokens, p50", lambda t: t.p50), ("first token", lambda t: t.first)):
        bares, throughs = ([1e3 * of(pair[side]) for pair in measured] for side in (0, 1))
        extra = statistics.median(t - b for b, t in zip(bares, throughs, strict=True))
        cells = (statistics.median(bares), statistics.median(throughs), extra)
        rows.append((name, *(f"{value:.2f}" for value in cells)))
    print(
        f"{engine.info.model}, {engine.info.hold}, {engine.info.dtype}, {len(measured)} rounds of {own['TOKENS']} tokens"
    )
    print(table(("milliseconds", "bare engine", "through the daemon", "more (median)"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
