"""Finished runs made from one that was really trained: the same base and template, another adapter with random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from launcher import methods, models
from launcher.config import Adapter, Quant


def derive(run: Path, folder: Path, seed: int, strength: float = 0.3, **options: Any) -> Path:
    """A run like `run` with an adapter of these options (`method`, `r`, `dora` and so on), its weights drawn by `seed`."""
    manifest = json.loads((run / "run.json").read_text())
    adapter = Adapter(**options)
    quant = Quant(bits=4) if adapter.method == "qlora" else Quant()
    manifest["config"] |= {"adapter": adapter.model_dump(mode="json"), "quant": quant.model_dump(mode="json")}
    manifest["base"]["quantisation"] = quant.type if quant.bits else None
    with models.quiet():
        model = methods.attach(models.load_base(Path(manifest["base"]["id"]), "fp32", quant, "cpu"), adapter)
    torch.manual_seed(seed)
    for name, parameter in methods.trainable(model).items():
        centre = 1.0 if "ia3" in name or "magnitude" in name else 0.0
        parameter.data = centre * parameter.data + strength * torch.randn_like(parameter)
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("adapter", "checkpoints"))
    methods.save(model, folder / "adapter")
    (folder / "run.json").write_text(json.dumps(manifest))
    return folder
