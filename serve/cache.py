"""The keys and values of every row, allocated once, behind the cache interface of transformers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache


class SlotCache(Cache):
    """Of each layer keys and values, [rows, heads, length + 1, head_dim]. A forward pass writes into bound rows.

    The last position is for padding: it is written and never read.
    """

    is_compileable = False

    def __init__(
        self, config: Any, num_rows: int, length: int, dtype: torch.dtype, devices: Sequence[torch.device]
    ) -> None:
        self.num_heads, head_dim = heads_of(config)
        self.length = length
        shape = (num_rows, self.num_heads, length + 1, head_dim)
        self.keys = [_zeros(shape, dtype, device) for device in devices]
        self.values = [_zeros(shape, dtype, device) for device in devices]
        self.layers: list[Any] = []

    def bind(self, rows: slice | torch.Tensor, positions: torch.Tensor, reads: int) -> None:
        """Where the next forward pass writes: `positions` int64 [B, L] of `rows`; it reads the first `reads` back.

        `rows` as a slice is read without copying; as int64 [B] the rows need not be neighbours.
        """
        self._rows, self._reads = rows, reads
        numbers = (
            torch.arange(len(positions), device=positions.device) + rows.start if isinstance(rows, slice) else rows
        )
        # Where each head of each row has each position, in the order of what is stored: one index for all layers.
        first = (numbers[:, None] * self.num_heads + torch.arange(self.num_heads, device=numbers.device)) * (
            self.length + 1
        )
        self._places = (first[:, :, None] + positions[:, None, :]).flatten()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, heads, L, head_dim] and return what the rows hold: [B, heads, reads, head_dim]."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        # Layers may live on several devices; on one this moves nothing.
        places = self._places.to(keys.device)
        for held, states in ((keys, key_states), (values, value_states)):
            held.view(-1, held.shape[-1]).index_copy_(0, places, states.to(held.dtype).reshape(-1, held.shape[-1]))
        rows = self._rows if isinstance(self._rows, slice) else self._rows.to(keys.device)
        return keys[rows, :, : self._reads], values[rows, :, : self._reads]

    def seed(self, row: int, prefix: torch.Tensor) -> None:
        """Begin a row with the keys and values of a trained prefix, [layers, 2, heads, tokens, head_dim]."""
        length = prefix.shape[3]
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys[row, :, :length] = prefix[layer, 0]
            values[row, :, :length] = prefix[layer, 1]

    def copy(self, source: int, target: int, length: int) -> None:
        """See `rows.Mover.copy`."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def swap(self, one: int, other: int, lengths: tuple[int, int]) -> None:
        """See `rows.Mover.swap`; what neither uses is not moved."""
        # Both as far as the longer one: what the shorter one would leave behind may not be a number.
        length = max(lengths)
        for tensor in (*self.keys, *self.values):
            kept = tensor[one, :, :length].clone()
            tensor[one, :, :length] = tensor[other, :, :length]
            tensor[other, :, :length] = kept

    def is_finite(self, row: int, length: int) -> bool:
        """Whether the first positions of a row are numbers: one that is none makes all of the layers above it none."""
        return all(bool(tensor[row, :, :length].isfinite().all()) for tensor in (self.keys[-1], self.values[-1]))

    def wipe(self, row: int) -> None:
        """Clear a row whose numbers went wrong: hidden positions count for nothing, but nothing times NaN is NaN."""
        for tensor in (*self.keys, *self.values):
            tensor[row] = 0

    def reserve(self, row: int, layer: int) -> None:
        """Write to what nobody has written to, so that the system gives the memory now and not in the middle of an answer."""
        self.keys[layer][row] = 0
        self.values[layer][row] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions are given explicitly."""
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """(length of keys, offset) for the mask, which is given explicitly too."""
        return self._reads, 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a processor numpy's, which take no memory before they are written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def heads_of(config: Any) -> tuple[int, int]:
    """(heads of keys and values, their dimension) of a model configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def row_bytes(config: Any, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one row takes: 2 x layers x heads x (length + 1) x head_dim x bytes a number."""
    heads, head_dim = heads_of(config)
    return 2 * config.num_hidden_layers * heads * (length + 1) * head_dim * dtype.itemsize
