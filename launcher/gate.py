"""The integrity gate: what was written is read back and held against what is in memory, after every save."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from launcher.errors import IntegrityError

# The largest difference of two logits, as a share of the largest logit, by the dtype of the forward pass.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
_ADVICE = "the last good checkpoint is kept, run the same command again to go on from it"


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A digest of each tensor, kept in place of a copy, to see later whether it has changed."""
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().float().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def check_file(
    file: Path, expected: Mapping[str, torch.Tensor], start: Mapping[str, str] | None = None, idle: Iterable[str] = ()
) -> None:
    """Raise `IntegrityError`, naming the tensors, unless `file` holds `expected` and has moved away from `start`.

    `start` has the digests of the tensors before training; those in `idle` have never had a gradient and may stand still.
    """
    try:
        saved = load_file(file)
    except Exception as error:
        raise IntegrityError(f"{file} cannot be read back ({error}); {_ADVICE}") from None
    faults = find_faults(saved, expected)
    if start:
        still = [name for name in start.keys() & saved.keys() if start[name] == _digest(saved[name])]
        moving = set(saved) - set(still)
        faults += [f"{name} has not changed since the start" for name in still if name not in set(idle) or not moving]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise IntegrityError(f"{file}: {sorted(faults)[0]}{more}; {_ADVICE}")


def find_faults(saved: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong with the tensors of a file, one phrase a fault, beginning with the tensor's name."""
    faults = [f"{name} is missing" for name in expected.keys() - saved.keys()]
    for name, tensor in saved.items():
        if name not in expected:
            faults.append(f"{name} is unknown")
        elif tensor.numel() == 0:
            faults.append(f"{name} is empty")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{name} is not finite (NaN or infinite)")
        elif not torch.equal(tensor.float(), expected[name].detach().float().cpu()):
            faults.append(f"{name} is not what was trained")
    return faults


def check_logits(live: torch.Tensor, reloaded: torch.Tensor, dtype: str) -> float:
    """The largest difference between the logits before and after reloading, as a share of the largest logit.

    Raises `IntegrityError` where it is more than the forward pass in `dtype` can explain.
    """
    difference = ((live - reloaded).abs().max() / live.abs().max()).item()
    if not difference <= TOLERANCE[dtype]:
        raise IntegrityError(f"the reloaded adapter answers differently (logits by {difference:.2%}); {_ADVICE}")
    return difference
