"""An engine in this process, and what it answers."""

from launcher import models
from serve.load import Load
from serve.settings import Settings
from serve.slot_engine import open_engine

NUM_TOKENS = 24


def engine(runs, hold="auto", dtype="fp32", **settings):
    """The slot engine for these runs."""
    with models.quiet():
        load = Load(tuple(map(str, runs)), hold, dtype, Settings(**{"context": 512, **settings}))
        return open_engine(load, lambda *_: None)


def answer(ours, asked, number=NUM_TOKENS):
    """The tokens for {slot: (ids, adapter, sampling)}, all at once, and how many ids each reused."""
    reused = {slot: ours.start(slot, ids, sampling, adapter) for slot, (ids, adapter, sampling) in asked.items()}
    tokens, reading = {}, list(asked)
    while reading:
        for read in ours.prefill(reading):
            if read.token is not None:
                tokens[read.slot] = [read.token]
                reading.remove(read.slot)
    for _ in range(number - 1):
        for slot, token in ours.step().items():
            tokens[slot].append(token)
    for slot in asked:
        ours.free(slot)
    return tokens, reused
