"""Checkpoints: the trained state only, whole, so they resume with another number of processes.

    checkpoints/step-00050/
        state.safetensors   param/<name>, exp_avg/<name>, exp_avg_sq/<name>: fp32, 12 bytes a trained parameter
        manifest.json       step, data position in samples, sha256 and size of the state

A checkpoint is written under a temporary name, synced and renamed. Random numbers are seeded by step, so there is no
generator state to keep.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from launcher import gate
from launcher.rundir import write_atomically
from launcher.weights import sha256

MOMENTS = ("exp_avg", "exp_avg_sq")
BITSANDBYTES_MOMENTS = {"exp_avg": "state1", "exp_avg_sq": "state2"}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `step` optimizer steps done, `position` samples seen."""

    folder: Path
    step: int
    position: int


def gather(parameters: Mapping[str, torch.nn.Parameter], optimizer: Any, *, sharded: bool) -> dict[str, torch.Tensor]:
    """The whole trained state on the CPU in fp32. With `sharded` (DeepSpeed) every process must call this together."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        whole = _gather_sharded(parameter) if sharded else _gather_local(parameter, optimizer)
        state |= {f"{kind}/{name}": tensor.detach().float().cpu().contiguous() for kind, tensor in whole.items()}
    return state


def put_back(
    state: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: Any,
    *,
    step: int,
    sharded: bool,
) -> None:
    """Load a gathered state into a prepared model and optimizer."""
    for name, parameter in parameters.items():
        values = {kind: state[f"{kind}/{name}"] for kind in ("param", *MOMENTS)}
        if sharded:
            _put_sharded(parameter, values)
        else:
            _put_local(parameter, values, optimizer, step)
    if sharded:
        for shard in optimizer.optimizer.state.values():
            shard["step"] = torch.tensor(float(step))


def write(
    run_dir: Path, state: dict[str, torch.Tensor], start: Mapping[str, str], *, step: int, position: int, keep: int
) -> Path:
    """Write `state` as the checkpoint of `step`, read it back, and delete all but the newest `keep`.

    `start` has the digests before training (see `gate.check_file`). Raises `IntegrityError`; the others are then untouched.
    """
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    part = root / f"step-{step:05d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    file = part / "state.safetensors"
    save_file(state, file)
    _sync(file)
    gate.check_file(file, state, start, idle(state))
    manifest = {"step": step, "position": position, "sha256": sha256(file), "size": file.stat().st_size}
    write_atomically(part / "manifest.json", json.dumps(manifest).encode())
    final = root / f"step-{step:05d}"
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    _sync(root)
    for old in sorted(root.glob("step-?????"))[:-keep]:
        shutil.rmtree(old)
    return final


def idle(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The parameters of a gathered state that have never had a gradient: their second moment is zero."""
    return [
        name for name in state if name.startswith("param/") and not state[name.replace("param", MOMENTS[1], 1)].any()
    ]


def newest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that was passed over."""
    passed: list[str] = []
    for folder in sorted((run_dir / "checkpoints").glob("step-?????"), reverse=True):
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            file = folder / "state.safetensors"
            if file.stat().st_size != manifest["size"] or sha256(file) != manifest["sha256"]:
                raise ValueError("its content is not what was written")
            return Checkpoint(folder, manifest["step"], manifest["position"]), passed
        except (OSError, ValueError, KeyError) as error:
            passed.append(f"passed over {folder}: {error}")
    return None, passed


def read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The state of a verified checkpoint."""
    return load_file(checkpoint.folder / "state.safetensors")


def _gather_local(parameter: torch.nn.Parameter, optimizer: Any) -> dict[str, torch.Tensor]:
    state = optimizer.state[parameter]
    names = BITSANDBYTES_MOMENTS if "state1" in state else {kind: kind for kind in MOMENTS}
    return {"param": parameter.data, **{kind: state[name] for kind, name in names.items()}}


def _put_local(parameter: torch.nn.Parameter, values: dict[str, torch.Tensor], optimizer: Any, step: int) -> None:
    parameter.data.copy_(values["param"])
    moments = {kind: values[kind].to(parameter.device) for kind in MOMENTS}
    if hasattr(optimizer, "init_state"):  # bitsandbytes fills its own buffers, paged ones included
        group = next(i for i, g in enumerate(optimizer.param_groups) if any(p is parameter for p in g["params"]))
        index = next(i for i, p in enumerate(optimizer.param_groups[group]["params"]) if p is parameter)
        optimizer.init_state(optimizer.param_groups[group], parameter, group, index)
        optimizer.state[parameter]["step"] = step
        for kind, name in BITSANDBYTES_MOMENTS.items():
            optimizer.state[parameter][name].copy_(moments[kind])
    else:
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}


def _gather_sharded(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
    return {"param": safe_get_full_fp32_param(parameter), **moments}


def _put_sharded(parameter: torch.nn.Parameter, values: dict[str, torch.Tensor]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    # The fp32 master is set by DeepSpeed; the copy that computes would follow only after the next step.
    safe_set_full_fp32_param(parameter, values["param"])
    parameter.data.copy_(values["param"])
    for kind in MOMENTS:
        safe_set_full_optimizer_state(parameter, values[kind], kind)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
