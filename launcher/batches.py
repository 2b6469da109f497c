"""Which examples a step sees, how the processes share them, and how they become tensors."""

import functools
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
        sums = [0] * num_rows
        for example in by_length:
            shortest = sums.index(min(sums))
            rows[shortest].append(example)
            sums[shortest] += len(example.ids)
        candidates.append((cost(num_rows, max(sums), quadratic), rows))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def cost(num_rows: int, length: int, quadratic: float) -> float:
    """What a forward pass costs, in tokens: attention adds `length / quadratic` to the price of a token.

    A layer of width d takes 24 d^2 floating-point operations a token for its matrices and 4 d L for its attention
    (arXiv:2001.08361, table 1), so `quadratic` is 6 d.
    """
    return num_rows * length * (1 + length / quadratic)


def padding_share(batches: Sequence[Sequence[Sequence[Example]]]) -> float:
    """The share of padding in batches of rows of examples."""
    real = sum(len(e.ids) for rows in batches for row in rows for e in row)
    paid = sum(len(rows) * max(sum(len(e.ids) for e in row) for row in rows) for rows in batches)
    return 1 - real / paid


def is_packing_cheaper(micros: Sequence[Sequence[Example]], quadratic: float) -> bool:
    """Whether packing these micro-batches saves at least a twentieth of what padding them costs."""
    padded = sum(cost(len(m), max(len(e.ids) for e in m), quadratic) for m in micros)
    packed = 0.0
    for micro in micros:
        rows = pack(micro, quadratic)
        packed += cost(len(rows), max(sum(len(e.ids) for e in row) for row in rows), quadratic)
    return packed < 0.95 * padded


def collate(rows: Sequence[Sequence[Example]], device: "torch.device | str" = "cpu") -> dict[str, "torch.Tensor"]:
    """Rows of examples -> tensors [rows, L], padded on the right.

    `input_ids` int64; `documents` int64, the number of the example in its row, 0 for padding; `trained` bool, never true
    for the first token of an example, which nothing predicts; and where a row holds several examples `positions` int64,
    counted from each one's start.
    """
    import torch

    shape = (len(rows), max(sum(len(example.ids) for example in row) for row in rows))
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
