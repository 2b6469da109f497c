"""Which examples a step sees, how the processes share them, and how they become tensors."""

import functools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.encoding import Example

if TYPE_CHECKING:
    import torch


def order(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of one step: slice `step` of an endless stream of seeded permutations, one an epoch.

    A pure function of its arguments: any number of processes sees the same global batches, and a resumed run goes on with
    the very example it would have seen.
    """
    first = step * batch_size
    return [
        _permutation(num_examples, seed, position // num_examples)[position % num_examples]
        for position in range(first, first + batch_size)
    ]


@functools.lru_cache(maxsize=2)
def _permutation(num_examples: int, seed: int, epoch: int) -> list[int]:
    indices = list(range(num_examples))
    random.Random(f"order-{seed}-{epoch}").shuffle(indices)
    return indices


def micro_batches(batch: list[Example], rank: int, world: int, micro: int) -> Iterator[list[Example]]:
    """This rank's share of a global batch, `micro` at a time. Sorted by length first, so little of a batch is padding."""
    by_length = sorted(batch, key=lambda example: len(example.ids))
    for first in range(rank * micro, len(by_length), world * micro):
        yield by_length[first : first + micro]


def collate(batch: list[Example], device: "torch.device | str" = "cpu") -> dict[str, "torch.Tensor"]:
    """Pad on the right: `input_ids` and `attention_mask` int64 [B, L], `trained` bool [B, L]."""
    import torch

    length = max(len(example.ids) for example in batch)
    input_ids = torch.zeros(len(batch), length, dtype=torch.long)
    attention_mask = torch.zeros(len(batch), length, dtype=torch.long)
    trained = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, example in enumerate(batch):
        n = len(example.ids)
        input_ids[row, :n] = torch.tensor(example.ids)
        attention_mask[row, :n] = 1
        trained[row, :n] = torch.tensor(example.trained)
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "trained": trained}
    return {name: tensor.to(device) for name, tensor in tensors.items()}
