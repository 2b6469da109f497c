"""Order, share, pad."""

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


def test_collate_pads_on_the_right_and_never_trains_padding():
    batch = batches.collate([Example([5, 6, 7], [False, True, True]), Example([5], [True])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["trained"].dtype == torch.bool
    assert batch["trained"].tolist() == [[False, True, True], [True, False, False]]
    assert count_trained([Example([5, 6, 7], [False, True, True]), Example([5], [True])]) == 2
