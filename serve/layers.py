"""Linear layers that serve several adapters at once, each row of a batch with its own.

The matrices of all adapters lie one below the other, [sum of ranks, features], so a mixed batch needs two plain products:
x A^T, of which each row keeps the columns of its own adapter, times B. Nothing is gathered, and the shapes do not depend on
who is in the batch. (Punica and S-LoRA, arXiv:2310.18547 and 2311.03285, gather in kernels of their own instead.)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BASE_INDEX = 0
# From so many rows on the usual order is as quick, see `multiply`.
MANY_ROWS = 64


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
        self._arrange()

    def drop(self, index: int) -> None:
        """Forget an adapter."""
        del self._parts[index]
        self._arrange()

    def _arrange(self) -> None:
        matrices = {i: (part.a, part.b) for i, part in self._parts.items() if part.a is not None and part.b is not None}
        self._ranks, self._a, self._scales = {}, None, {}
        if matrices:
            self._a = torch.cat([a for a, _ in matrices.values()])
            self._b = torch.cat([b for _, b in matrices.values()])
            self._owner = torch.cat([torch.full((len(a),), i, device=a.device) for i, (a, _) in matrices.items()])
            start = 0
            for index, (a, _) in matrices.items():
                ranks = self._ranks[index] = slice(start, start := start + len(a))
                # Views, so that nothing is held twice.
                self._parts[index].a, self._parts[index].b = self._a[ranks], self._b[ranks]
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
            return multiply(self.base, x)
        y = multiply(self.base, x * self._scale("in_scale") if "in_scale" in self._scales else x)
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
            return y + (product(self._a[ranks], x) @ self._b[ranks]).to(y.dtype)
        mine = self._owner == self._batch.index.to(self._owner.device)[:, None, None]
        # `where` and not a product with 0: one adapter's infinity must not become its neighbours' NaN.
        columns = torch.where(mine, product(self._a, x), 0)
        return y + (columns @ self._b).to(y.dtype)


def multiply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes, [..., in] -> [..., out]; on a processor by the quicker of two orders for few rows in fp32.

    BLAS reads a weight several times faster as the left factor (W x^T) than as the right one when there are few rows;
    docs/benchmarks.md has the figures.
    """
    is_plain = type(layer) is nn.Linear and x.device.type == "cpu" and x.dtype is torch.float32
    if not is_plain:
        return layer(x)
    y = product(layer.weight, x)
    return y if layer.bias is None else y + layer.bias


def product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x W^T for `weight` [out, in] and x [..., in]."""
    num_rows = x.numel() // x.shape[-1]
    if not 1 < num_rows < MANY_ROWS or x.device.type != "cpu" or x.dtype is not torch.float32:
        return nn.functional.linear(x, weight)
    # Contiguous on both sides: what comes after, and the next product, are slower on transposed numbers.
    flat = x.reshape(num_rows, x.shape[-1]).contiguous()
    return torch.mm(weight, flat.t()).t().contiguous().view(*x.shape[:-1], len(weight))
