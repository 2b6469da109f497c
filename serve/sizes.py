"""How many rows of which length fit the memory there is."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serve.errors import UserError

LEAST_CONTEXT = 256


def layer_devices(model: Any) -> list[torch.device]:
    """Where each decoder layer of a model lives."""
    number = model.config.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    return [next(layer.parameters()).device for layer in stacks[0]]


def free_bytes(device: torch.device, share: float) -> int:
    """What is left of the memory once `share` of all of it, or of what is available on a processor's side, is used."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - (1 - share) * total))
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(int(fields["MemAvailable"].split()[0]) * 1024 * share)


def free_for_rows(devices: Sequence[torch.device], share: float) -> int:
    """What rows may take, in bytes, when each layer's part of them lies on that layer's device: `devices`, one a layer."""
    # A device with a third of the layers has a third of every row: what is free there holds three times as much in rows.
    return min(
        free_bytes(device, share) * len(devices) // num_layers for device, num_layers in Counter(devices).items()
    )


def fit(free: int, bytes_of: Callable[[int], int], number: int, length: int) -> tuple[int, int]:
    """(rows, length): as many of `number` rows as fit, shorter ones if not even one does.

    `bytes_of(length)` is what a row takes. A quarter is left for a step's own tensors. Raises `UserError`.
    """
    room = free * 3 // 4
    while bytes_of(length) > room:
        length //= 2
        if length < LEAST_CONTEXT:
            raise UserError(f"{free / 2**30:.1f} GiB are free, too little for one conversation; try HOLD=4bit")
    return max(1, min(number, room // bytes_of(length))), length
