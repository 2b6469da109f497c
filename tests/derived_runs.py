"""Finished runs made from one that was really trained: the same base and template, another adapter with random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from launcher import methods, models
from launcher.config import Adapter, Quant
from tests.running import run_python


def train(model: Path, method: str, folder: Path) -> Path:
    """A short real training."""
    done = run_python(
        "-m", "launcher", "train", f"MODEL={model}", f"PEFT={method}", f"RUN={folder}",
        "data.limit=32", "batch.size=8", "optim.lr=1e-2", "model.dtype=fp32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def derive(run: Path, folder: Path, seed: int, strength: float = 0.3, **options: Any) -> Path:
    """A run like `run` with an adapter of these options (`method`, `r`, `dora` and so on), its weights drawn by `seed`."""
    manifest = json.loads((run / "run.json").read_text())
    adapter = Adapter(**options)
    manifest["config"]["adapter"] = adapter.model_dump(mode="json")
    with models.quiet():
        model = methods.attach(models.load_base(Path(manifest["base"]["id"]), "fp32", Quant(), "cpu"), adapter)
    torch.manual_seed(seed)
    for name, parameter in methods.trainable(model).items():
        centre = 1.0 if "ia3" in name or "magnitude" in name else 0.0
        parameter.data = centre * parameter.data + strength * torch.randn_like(parameter)
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("adapter", "checkpoints"))
    methods.save(model, folder / "adapter")
    (folder / "run.json").write_text(json.dumps(manifest))
    return folder
