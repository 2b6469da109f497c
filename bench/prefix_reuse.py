"""The time that a remembered prefix saves the next turn of a long conversation: `python -m bench.prefix_reuse RUN=runs/smollm2-135m-lora`.

The same turn twice, in turn: with what the row remembers, and after forgetting it. Times to the first token, medians.
"""

import statistics
import sys
import time

from bench.daemon import chosen
from launcher import cafe
from serve.engine import Sampling
from serve.load import Load
from serve.slot_engine import SlotEngine, open_engine

LENGTH = 1500
ROUNDS = 3


def first_token(engine: SlotEngine, ids: list[int], adapter: str) -> tuple[float, int]:
    """Seconds to the first token of a request that is alone, and how many of its ids were not read again."""
    begun = time.perf_counter()
    reused = engine.start(0, ids, Sampling(), adapter)
    while engine.prefill([0])[0].token is None:
        pass
    seconds = time.perf_counter() - begun
    engine.free(0)
    return seconds, reused


def main(words: list[str]) -> int:
    """Print the two times and their ratio."""
    own, _ = chosen(words, RUN="runs/smollm2-135m-lora")
    engine = open_engine(Load((own["RUN"],)), lambda *_: None)
    while engine.reserve():
        pass
    adapter = engine.info.adapters[0].key
    turns: list[dict[str, str]] = []
    for example in cafe.examples("train"):
        turns += example["messages"]
        if len(engine.prompt_ids(turns[:-1])) >= LENGTH:
            break
    before, after = engine.prompt_ids(turns[:-3]), engine.prompt_ids(turns[:-1])
    cold, warm, reused = [], [], 0
    for _ in range(ROUNDS):
        engine._rows.forget(adapter)
        cold.append(first_token(engine, after, adapter)[0])
        engine._rows.forget(adapter)
        first_token(engine, before, adapter)
        seconds, reused = first_token(engine, after, adapter)
        warm.append(seconds)
    slow, quick = statistics.median(cold), statistics.median(warm)
    print(f"{engine.info.model}, {engine.info.dtype}, {len(after)} tokens, {reused} of them read in the turn before")
    print(f"first token after {slow:.2f} s without, {quick:.2f} s with what was read: {slow / quick:.1f} times sooner")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
