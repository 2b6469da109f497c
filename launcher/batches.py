"""Which examples a step sees, how the processes share them, and how they become tensors."""

import functools
import heapq
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

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


def pack(batch: Sequence[Example], quadratic: float) -> list[list[Example]]:
    """Lay examples one after another in as many rows as are cheapest; every row costs what the longest does.

    For each number of rows the examples go, longest first, to the shortest row so far (Graham's LPT rule).
    """
    by_length = sorted(batch, key=lambda example: -len(example.ids))
    candidates = []
    for num_rows in range(1, len(batch) + 1):
        rows: list[list[Example]] = [[] for _ in range(num_rows)]
        shortest = [(0, row) for row in range(num_rows)]
        for example in by_length:
            length, row = shortest[0]
            rows[row].append(example)
            heapq.heapreplace(shortest, (length + len(example.ids), row))
        candidates.append(rows)
    return min(candidates, key=lambda rows: cost_of(rows, quadratic))


def width(rows: Sequence[Sequence[Example]]) -> int:
    """Tokens of the longest row, to which the others are padded."""
    return max(sum(len(example.ids) for example in row) for row in rows)


def cost_of(rows: Sequence[Sequence[Example]], quadratic: float) -> float:
    """What a forward pass over these rows costs (see `cost`)."""
    return cost(len(rows), width(rows), quadratic)


def cost(num_rows: int, length: int, quadratic: float) -> float:
    """What a forward pass costs, in tokens: attention adds `length / quadratic` to the price of a token.

    A layer of width d takes 24 d^2 floating-point operations a token for its matrices and 4 d L for its attention
    (arXiv:2001.08361, table 1), so `quadratic` is 6 d.
    """
    return num_rows * length * (1 + length / quadratic)


def padding_share(batches: Sequence[Sequence[Sequence[Example]]]) -> float:
    """The share of padding in batches of rows of examples."""
    real = sum(len(e.ids) for rows in batches for row in rows for e in row)
    paid = sum(len(rows) * width(rows) for rows in batches)
    return 1 - real / paid


def is_packing_cheaper(micros: Sequence[Sequence[Example]], quadratic: float) -> bool:
    """Whether packing these micro-batches saves at least a twentieth of what padding them costs."""
    padded = sum(cost_of(each_alone(micro), quadratic) for micro in micros)
    packed = sum(cost_of(pack(micro, quadratic), quadratic) for micro in micros)
    return packed < 0.95 * padded


def collate(rows: Sequence[Sequence[Example]], device: "torch.device | str" = "cpu") -> dict[str, "torch.Tensor"]:
    """Rows of examples -> tensors [rows, L], padded on the right.

    `input_ids` int64; `documents` int64, the number of the example in its row, 0 for padding; `trained` bool, never true
    for the first token of an example, which nothing predicts; and where a row holds several examples `positions` int64,
    counted from each one's start.
    """
    import torch

    shape = (len(rows), width(rows))
    input_ids, documents, positions = (np.zeros(shape, np.int64) for _ in range(3))
    trained = np.zeros(shape, bool)
    for index, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            span = slice(start, start + len(example.ids))
            input_ids[index, span] = example.ids
            documents[index, span] = number
            positions[index, span] = np.arange(len(example.ids))
            trained[index, span] = example.trained
            trained[index, start] = False
            start = span.stop
    arrays = {"input_ids": input_ids, "documents": documents, "trained": trained}
    if any(len(row) > 1 for row in rows):
        arrays["positions"] = positions
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def each_alone(batch: Sequence[Example]) -> list[list[Example]]:
    """One example a row: what packing is not."""
    return [[example] for example in batch]
