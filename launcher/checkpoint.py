"""Checkpoints: the trained state only, whole, so they resume with another number of processes.

    checkpoints/step-00050/
        state.safetensors   param/<name>, exp_avg/<name>, exp_avg_sq/<name>: fp32, 12 bytes a trained parameter
        manifest.json       step, data position in samples, held-out loss if measured, sha256 and size of the state

A checkpoint is written under a temporary name, synced and renamed. Random numbers are seeded by step, so there is no
generator state to keep.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from launcher import gate, shards
from launcher.errors import UserError
from launcher.rundir import sync, write_atomically
from launcher.shards import MOMENTS
from launcher.weights import sha256

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `step` optimizer steps done, `position` samples seen."""

    folder: Path
    step: int
    position: int


def gather(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: Any, stage: int | None = None
) -> dict[str, torch.Tensor]:
    """The whole trained state on the CPU in fp32. Under DeepSpeed, at `stage`, every process must call this together.

    Raises `UserError` for a parameter that no step has changed, because the loss does not depend on it.
    """
    if stage is None and (
        unused := [name for name, parameter in parameters.items() if parameter not in optimizer.state]
    ):
        raise UserError(
            f"{unused[0]} has never had a gradient: the loss passes it by; try other adapter.targets, or another MODEL"
        )
    state: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        whole = shards.read(parameter, optimizer, stage)
        state |= {f"{kind}/{name}": tensor.detach().float().cpu().contiguous() for kind, tensor in whole.items()}
    return state


def put_back(
    state: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: Any,
    *,
    step: int,
    stage: int | None = None,
) -> None:
    """Load a gathered state into a prepared model and optimizer."""
    for name, parameter in parameters.items():
        shards.write_parameter(parameter, state[f"param/{name}"], stage)
        shards.write_moments(parameter, {k: state[f"{k}/{name}"] for k in MOMENTS}, optimizer, step, stage)
    if stage is not None:
        for shard in optimizer.optimizer.state.values():
            shard["step"] = torch.tensor(float(step))


def write(
    run_dir: Path,
    state: dict[str, torch.Tensor],
    start: Mapping[str, str],
    *,
    step: int,
    position: int,
    keep: int,
    loss: float | None = None,
) -> Path:
    """Write `state` as the checkpoint of `step`, read it back, and delete all but the newest `keep` and the best.

    `start` has the digests before training (see `gate.check_file`), `loss` the held-out loss where it was measured at this
    step. Raises `IntegrityError`, or `OSError` when the disk is full; the others are then untouched.
    """
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    part = root / f"step-{step:05d}.part"
    _forget_parts(root)
    part.mkdir()
    try:
        _write_into(part, state, start, {"step": step, "position": position, "loss": loss})
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    final = root / part.stem
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    sync(root)
    prune(root, keep, final)
    return final


def _write_into(
    folder: Path, state: dict[str, torch.Tensor], start: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    file = folder / "state.safetensors"
    save_file(state, file)
    sync(file)
    gate.check_file(file, state, start, idle(state))
    manifest = {**facts, "sha256": sha256(file), "size": file.stat().st_size}
    write_atomically(folder / MANIFEST, json.dumps(manifest).encode())
    sync(folder)


def _forget_parts(root: Path) -> None:
    """What an earlier attempt left half-written."""
    for part in root.glob("step-*.part"):
        shutil.rmtree(part, ignore_errors=True)


def prune(root: Path, keep: int, written: Path) -> None:
    """Delete all checkpoints but `written`, the newest before it, `keep` in all, and the one with the lowest held-out loss."""
    folders = _folders(root)
    # Those of later steps were passed over, as damaged, when the run went on: the run makes them anew.
    sound = folders[: folders.index(written) + 1]
    losses = {folder: loss for folder in sound if (loss := _loss(folder)) is not None}
    best = min(losses, key=lambda folder: losses[folder]) if losses else None
    for old in folders:
        if old != best and old not in sound[-keep:]:
            # Under its other name first: a folder that is half gone must not look like a checkpoint.
            part = old.with_suffix(".part")
            old.rename(part)
            shutil.rmtree(part)


def _folders(root: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    found = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _loss(folder: Path) -> float | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["loss"]
    except (OSError, ValueError, KeyError):
        return None


def idle(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The parameters of a gathered state that have never had a gradient: their second moment is zero."""
    return [
        name for name in state if name.startswith("param/") and not state[name.replace("param", MOMENTS[1], 1)].any()
    ]


def newest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that was passed over."""
    passed: list[str] = []
    for folder in reversed(_folders(run_dir / "checkpoints")):
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            file = folder / "state.safetensors"
            if file.stat().st_size != manifest["size"] or sha256(file) != manifest["sha256"]:
                raise ValueError("its content is not what was written")
            return Checkpoint(folder, manifest["step"], manifest["position"]), passed
        except (OSError, ValueError, KeyError, TypeError) as error:
            passed.append(f"passed over {folder}: {error}")
    return None, passed


def read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The state of a verified checkpoint."""
    return load_file(checkpoint.folder / "state.safetensors")
