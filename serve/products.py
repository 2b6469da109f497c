"""How a processor multiplies few rows by a weight: as everybody does, x W^T, or in a quicker way, if it has one.

Two ways are known. With AMX or AVX-512, bf16 weights in oneDNN's own layout are read once, where they are otherwise rearranged for
every product. On other processors BLAS reads an fp32 weight faster as the left factor, W x^T, than as the right one.
Which holds differs by a factor of two either way (docs/benchmarks.md), so it is measured, once, on the weights themselves.
"""

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

# From so many rows on all orders are as quick.
MANY_ROWS = 64
SIZES = (1, 2, 4, 8, 16, 32)
# So many bytes of weights in a row do not come from the caches of a processor, as those of a whole model do not.
MEASURED_BYTES = 2**26
# Of a model with less, no way is worth measuring.
LEAST_BYTES = 2**24
ROUNDS = 5
# Clearly quicker, so that the same processor decides the same way each time.
CLEARLY = 0.9

Product = Callable[[torch.Tensor], torch.Tensor]


class Products:
    """The quicker ways of this processor: none until `measure` was called, and none on a GPU."""

    def __init__(self, turned: Iterable[int] = (), *, is_packed: bool = False) -> None:
        self.turned = frozenset(turned)
        self.is_packed = is_packed

    def measure(self, layers: Iterable[nn.Module]) -> None:
        """Measure on the first plain layers of a model, of one dtype, on a processor; takes about a second."""
        weights: list[torch.Tensor] = []
        for layer in layers:
            if _is_plain(layer) and sum(map(_num_bytes, weights)) < MEASURED_BYTES:
                weights.append(layer.weight)
        if sum(map(_num_bytes, weights)) < LEAST_BYTES:
            return
        if weights[0].dtype is torch.bfloat16:
            is_known = torch.ops.mkldnn._is_mkldnn_bf16_supported()
            self.is_packed = is_known and all(_is_quicker(_pack, weights, number) for number in (1, 16))
        elif weights[0].dtype is torch.float32:
            self.turned = frozenset(number for number in SIZES if _is_quicker(_turn, weights, number))

    def quicker(self, layer: nn.Module) -> nn.Module:
        """The same layer in the way that is quicker here, with the same numbers but for rounding."""
        if not _is_plain(layer):
            return layer
        if self.is_packed:
            return PackedLinear(layer)
        return TurnedLinear(layer, self) if self.turned else layer

    def product(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x W^T for `weight` [out, in] and x [..., in]."""
        num_rows = x.numel() // x.shape[-1]
        if not 0 < num_rows < MANY_ROWS or max(s for s in SIZES if s <= num_rows) not in self.turned:
            return nn.functional.linear(x, weight)
        return turned(weight, x.reshape(num_rows, x.shape[-1])).view(*x.shape[:-1], len(weight))


class PackedLinear(nn.Linear):
    """A linear layer whose weight lies in the layout that oneDNN multiplies with."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        with torch.inference_mode():
            self._packed = pack(layer.weight)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in the usual layout, a copy."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return multiply_packed(self._packed, x, self.bias)


class TurnedLinear(nn.Linear):
    """A linear layer that multiplies few rows as W x^T."""

    def __init__(self, layer: nn.Linear, products: Products) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._products = products

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        y = self._products.product(self.weight, x)
        return y if self.bias is None else y + self.bias


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] in oneDNN's layout, by the operators that `torch.compile` uses for the same purpose."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def multiply_packed(packed: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T for x [..., in], the bias added."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def turned(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x W^T as (W x^T)^T, for x [rows, in]."""
    # Contiguous on both sides: what comes after, and the next product, are slower on transposed numbers.
    x = x.contiguous()
    if len(x) > 1:
        return torch.mm(weight, x.t()).t().contiguous()
    # One row would be a product of a matrix and a vector, which has a way of its own; two take no longer than one.
    return torch.mm(weight, x.expand(2, -1).contiguous().t())[:, :1].t().contiguous()


def _pack(weight: torch.Tensor) -> Product:
    packed = pack(weight)
    return lambda x: multiply_packed(packed, x)


def _turn(weight: torch.Tensor) -> Product:
    return lambda x: turned(weight, x)


@torch.inference_mode()
def _is_quicker(way: Callable[[torch.Tensor], Product], weights: Sequence[torch.Tensor], num_rows: int) -> bool:
    inputs = {w.shape[1]: torch.ones(num_rows, w.shape[1], dtype=w.dtype) for w in weights}
    usual = [lambda x, w=w: nn.functional.linear(x, w) for w in weights]
    other = [way(weight) for weight in weights]
    seconds = {id(usual): float("inf"), id(other): float("inf")}
    # In turn, the best of some rounds: others use this processor, too.
    for _ in range(ROUNDS):
        for products in (usual, other):
            begun = time.perf_counter()
            for product, weight in zip(products, weights, strict=True):
                product(inputs[weight.shape[1]])
            seconds[id(products)] = min(seconds[id(products)], time.perf_counter() - begun)
    return seconds[id(other)] < CLEARLY * seconds[id(usual)]


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.device.type == "cpu"


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
