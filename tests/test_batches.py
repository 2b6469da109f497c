"""Order, share, pad."""

import random

import numpy as np
import pytest
import torch

from launcher import batches
from launcher.encoding import Example, count_trained


def test_order_visits_every_example_once_an_epoch():
    epochs = [[i for step in range(s, s + 5) for i in batches.order(20, 4, step, seed=3)] for s in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert batches.order(20, 4, 1, seed=3) != batches.order(20, 4, 1, seed=4)


@pytest.mark.parametrize(("world", "micro"), [(1, 16), (1, 4), (2, 4), (4, 2)])
def test_the_processes_share_the_global_batch(world, micro):
    batch = [Example([1] * (5 + i), [True] * (5 + i)) for i in range(16)]
    parts = [list(batches.micro_batches(batch, rank, world, micro)) for rank in range(world)]
    assert all(len(part) == 16 // (world * micro) for part in parts)
    assert sorted(len(e.ids) for part in parts for m in part for e in m) == [5 + i for i in range(16)]


def example(length, first=1):
    ids = np.arange(first, first + length, dtype=np.int32)
    return Example(ids, ids % 3 != 0)


def test_collate_pads_on_the_right_and_never_trains_padding():
    rows = batches.each_alone([Example([5, 6, 7], [True, True, True]), Example([5], [True])])
    batch = batches.collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["documents"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["trained"].dtype == torch.bool
    # The first token of an example is predicted by nothing.
    assert batch["trained"].tolist() == [[False, True, True], [False, False, False]]
    assert batch["trained"].sum() == count_trained([Example([5, 6, 7], [True, True, True]), Example([5], [True])])
    assert "positions" not in batch


def test_collate_packs_with_positions_and_documents_of_their_own():
    batch = batches.collate([[example(3), example(2, first=7)], [example(4)]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7, 8], [1, 2, 3, 4, 0]]
    assert batch["documents"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["trained"].tolist() == [[False, True, False, False, True], [False, True, False, True, False]]


def test_packing_holds_every_example_once_and_costs_no_more_than_padding():
    rng = random.Random(0)
    for _ in range(50):
        batch = [example(rng.randint(1, 200)) for _ in range(rng.randint(1, 16))]
        rows = batches.pack(batch, quadratic=3456)
        assert sorted(len(e.ids) for row in rows for e in row) == sorted(len(e.ids) for e in batch)
        longest = max(sum(len(e.ids) for e in row) for row in rows)
        padded = batches.cost(len(batch), max(len(e.ids) for e in batch), 3456)
        assert batches.cost(len(rows), longest, 3456) <= padded


def test_packing_is_chosen_where_lengths_differ_and_not_where_they_do_not():
    assert batches.is_packing_cheaper([[example(n) for n in (10, 20, 30, 100)]], 3456)
    assert not batches.is_packing_cheaper([[example(50)] * 8], 3456)
    # Where attention is what costs, one long row is no bargain.
    assert not batches.is_packing_cheaper([[example(n) for n in (70, 80, 90, 100)]], 1)
    assert batches.padding_share([batches.each_alone([example(10), example(30)])]) == pytest.approx(1 / 3)
