"""The model catalogue: `configs/models/<name>.yaml` -> `ModelCard`. Other hub ids and folders get a bare card."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from launcher.variables import CONFIGS, shipped


class ModelCard(BaseModel):
    """Where a base model comes from: exactly one of `package`, `hub`, `folder`.

    `template` is a chat template, for a model that has none or in place of its own. `config` has those keys of its config.json that
    say how large it is (see `architecture.read`), so that a run can be planned before the model is here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    package: str | None = None
    file: str | None = None
    sha256: str | None = None
    hub: str | None = None
    revision: str = "main"
    gated: bool = False
    folder: str | None = None
    template: str | None = None
    config: dict[str, Any] | None = None


def card(name: str) -> ModelCard:
    """The card of a catalogue name, a local folder or a hub id."""
    if name in shipped("models"):
        return ModelCard(name=name, **yaml.safe_load((CONFIGS / "models" / f"{name}.yaml").read_text(encoding="utf-8")))
    if Path(name).is_dir():
        return ModelCard(name=name, folder=str(Path(name).resolve()))
    return ModelCard(name=name, hub=name)
