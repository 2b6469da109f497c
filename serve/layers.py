"""Linear layers that serve several adapters at once, each row of a batch with its own.

The matrices of all adapters lie one below the other, [sum of ranks, features], so a mixed batch needs two plain products:
x A^T, of which each row keeps the columns of its own adapter, times B. Nothing is gathered, and the shapes do not depend on
who is in the batch. (Punica and S-LoRA, arXiv:2310.18547 and 2311.03285, gather in kernels of their own instead.)
"""

from dataclasses import dataclass

import torch
from torch import nn

from serve.products import Products

BASE_INDEX = 0
# Who owns the columns that no adapter uses.
NOBODY = -1
# One column in so many may be unused.
SPARE = 4


@dataclass
class Part:
    """What one adapter does to one layer W: y = out_scale * W(x * in_scale) + shift + b^T a x.

    a [r, in], b [r, out] with the adapter's scaling in it, in_scale [in], out_scale and shift [out]; None: not there.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    in_scale: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None


class Batch:
    """Which adapter each row of the coming forward pass uses; shared by all layers. Index 0 is the base."""

    def __init__(self) -> None:
        self.index = torch.zeros(0, dtype=torch.long)
        # The only adapter of the batch, None for several.
        self.only: int | None = BASE_INDEX
        self.products = Products()

    def bind(self, index: torch.Tensor, only: int | None) -> None:
        """`index` int64 [B]."""
        self.index, self.only = index, only


class AdaptedLinear(nn.Module):
    """A layer of the base, unchanged, and what the loaded adapters add to it."""

    def __init__(self, base: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.base = base
        self._batch = batch
        self._parts: dict[int, Part] = {}
        self._ranks: dict[int, slice] = {}
        self._a: torch.Tensor | None = None
        self._scales: dict[str, torch.Tensor] = {}

    def put(self, index: int, part: Part) -> None:
        """Serve one more adapter."""
        self._parts[index] = part
        if part.a is not None:
            self._place(index, part)
        self._tabulate()

    def drop(self, index: int) -> None:
        """Forget an adapter; a later one takes its place."""
        del self._parts[index]
        if (ranks := self._ranks.pop(index, None)) is not None:
            self._owner[ranks] = NOBODY
        if not self._ranks:
            self._a = None
        self._tabulate()

    def _place(self, index: int, part: Part) -> None:
        """Write a and b where nobody is, or below all others: what is there already is not moved."""
        a, b = part.a, part.b
        assert a is not None and b is not None
        start = 0
        for taken in sorted(self._ranks.values(), key=lambda ranks: ranks.start):
            if taken.start - start >= len(a):
                break
            start = taken.stop
        ranks = self._ranks[index] = slice(start, start + len(a))
        if self._a is None:
            self._a, self._b, self._owner = (
                a.new_empty(0, a.shape[1]),
                b.new_empty(0, b.shape[1]),
                _nobodies(0, a.device),
            )
        if ranks.stop > len(self._a):
            # Some more than needed, so that not every adapter that comes copies all that are there.
            missing = max(ranks.stop - len(self._a), len(self._a) // SPARE)
            self._a = torch.cat([self._a, a.new_zeros(missing, a.shape[1])])
            self._b = torch.cat([self._b, b.new_zeros(missing, b.shape[1])])
            self._owner = torch.cat([self._owner, _nobodies(missing, a.device)])
        self._a[ranks], self._b[ranks], self._owner[ranks] = a, b, index
        # So that nothing is held twice.
        part.a = part.b = None

    def _tabulate(self) -> None:
        """The vectors of all adapters, one a row, by their index."""
        self._scales = {}
        for name, neutral in (("in_scale", 1.0), ("out_scale", 1.0), ("shift", 0.0)):
            vectors = {i: v for i, part in self._parts.items() if (v := getattr(part, name)) is not None}
            if vectors:
                some = next(iter(vectors.values()))
                self._scales[name] = some.new_full((max(self._parts) + 1, len(some)), neutral)
                for index, vector in vectors.items():
                    self._scales[name][index] = vector

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, in] -> [B, L, out]."""
        if self._batch.only == BASE_INDEX:
            return self.base(x)
        y = self.base(x * self._scale("in_scale") if "in_scale" in self._scales else x)
        if "out_scale" in self._scales:
            y = y * self._scale("out_scale")
        if "shift" in self._scales:
            y = y + self._scale("shift")
        return y if self._a is None else self._add_product(y, x.to(self._a.dtype))

    def _scale(self, name: str) -> torch.Tensor:
        table = self._scales[name]
        # The layers of a model may live on several devices; on one this moves nothing.
        return table[self._batch.index.to(table.device)][:, None]

    def _add_product(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert self._a is not None
        only = self._batch.only
        if only is not None:
            if only not in self._ranks:
                return y
            ranks = self._ranks[only]
            return y + (self._batch.products.product(self._a[ranks], x) @ self._b[ranks]).to(y.dtype)
        mine = self._owner == self._batch.index.to(self._owner.device)[:, None, None]
        # `where` and not a product with 0: one adapter's infinity must not become its neighbours' NaN.
        columns = torch.where(mine, self._batch.products.product(self._a, x), 0)
        return y + (columns @ self._b).to(y.dtype)


def _nobodies(number: int, device: torch.device) -> torch.Tensor:
    return torch.full((number,), NOBODY, device=device)
