"""Recorded steps: which are kept, what they share, and what happens where recording fails."""

from types import SimpleNamespace

import pytest
import torch

from serve import graphs
from serve.graphs import MAX_GRAPHS, Graphs, Recording, length_bucket, record_cuda, row_bucket

NUMBERS = torch.arange(3)


class Recorder:
    """Replays on a processor: the step runs again on the very memory that was recorded, and nothing else."""

    def __init__(self, room=1000):
        self.num_recorded, self.pools, self.room = 0, [], room

    def __call__(self, step, inputs, pool):
        self.pools.append(pool)
        if not self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB\nand more")
        self.room -= 1
        self.num_recorded += 1
        output = step(inputs)
        return Recording(lambda: output.copy_(step(inputs)), output, pool or f"pool {self.num_recorded}")


def double(inputs):
    return 2 * inputs


def run(ours, *keys):
    """Each key's step does what it does unrecorded, with new numbers every time."""
    for number, key in enumerate(keys):
        assert torch.equal(ours.run(key, double, NUMBERS + number), double(NUMBERS + number))


def test_what_was_not_used_for_longest_makes_room():
    record = Recorder()
    ours = Graphs(record)
    run(ours, *range(MAX_GRAPHS), 0)
    assert record.num_recorded == MAX_GRAPHS
    run(ours, MAX_GRAPHS, 0)
    assert record.num_recorded == MAX_GRAPHS + 1
    run(ours, 1)
    assert record.num_recorded == MAX_GRAPHS + 2 and ours.state == "on"


def test_recordings_share_memory_until_all_are_forgotten():
    record = Recorder()
    ours = Graphs(record)
    run(ours, "a", "b", "c", "a")
    ours.forget()
    run(ours, "a", "b")
    assert record.pools == [None, "pool 1", "pool 1", None, "pool 4"]


def test_where_memory_runs_out_half_as_many_are_kept():
    record = Recorder(room=8)
    ours = Graphs(record)
    run(ours, *range(8))
    assert record.num_recorded == 8
    # The ninth runs as it is, and what the others took is free again.
    run(ours, 8)
    record.room = 8
    run(ours, *range(4), *range(4))
    assert ours.state == "on" and record.num_recorded == 12
    run(ours, 4, 1, 2, 3, 0)
    assert record.num_recorded == 14


def test_recording_ends_where_nothing_fits_or_it_is_refused():
    ours = Graphs(Recorder(room=0))
    run(ours, "a", "a")
    assert not ours.is_on and ours.state == "off: CUDA out of memory. Tried to allocate 2.00 MiB"

    def refuse(step, inputs, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    ours = Graphs(refuse)
    run(ours, "a", "a")
    assert not ours.is_on and ours.state == "off: operation not permitted when stream is capturing"
    assert Graphs(None).state == "off"


def test_shapes_are_few():
    assert [row_bucket(number, 48) for number in (1, 2, 3, 5, 8, 33)] == [1, 2, 4, 8, 8, 48]
    assert [length_bucket(length, 2000) for length in (1, 256, 257, 384, 385, 513, 769, 1100)] == [
        256, 256, 384, 384, 512, 768, 1024, 1536,
    ]  # fmt: skip
    assert length_bucket(1537, 2000) == 2000 and length_bucket(100, 128) == 128
    assert len({length_bucket(length, 4096) for length in range(1, 4097)}) == 9
    assert all(length_bucket(length, 4096) >= length for length in range(1, 4097))


@pytest.mark.parametrize("refusal", [None, "capture_begin", "step", "capture_end"])
def test_the_stream_of_the_caller_comes_back(refusal, monkeypatch):
    """torch's own context managers over a driver that is not there: what a failed capture leaves behind."""
    device = torch.device("cuda", 0)
    streams = [SimpleNamespace(device=device, wait_stream=lambda other: None) for _ in range(3)]
    main, *sides = streams
    current, pools = [main], []

    def call(name):
        if name == refusal:
            raise RuntimeError(name)

    class Graph:
        def capture_begin(self, pool=None, **_):
            pools.append(pool)
            call("capture_begin")

        def capture_end(self):
            call("capture_end")

        def replay(self):
            call("replay")

        def pool(self):
            return "pool"

    def step(inputs):
        if pools:
            call("step")
        return current[-1]

    monkeypatch.setattr(torch.cuda, "_get_device_index", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: sides.pop())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    graphs._side_stream.cache_clear()
    inputs = SimpleNamespace(device=device)
    if refusal:
        with pytest.raises(RuntimeError, match=refusal):
            record_cuda(step, inputs, None)
    else:
        first = record_cuda(step, inputs, None)
        second = record_cuda(step, inputs, first.pool)
        # Both on the same stream beside the main one, and in the same memory.
        assert first.output is second.output is not main
        assert pools == [None, "pool"]
    assert current[-1] is main
    graphs._side_stream.cache_clear()
