"""Read a finished run back: tokenizer, base and adapter, in the form in which they are measured or served."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from launcher import methods, models, rundir
from launcher.catalogue import card
from launcher.config import Config, check
from launcher.errors import UserError
from launcher.hardware import detect
from launcher.models import quiet
from launcher.weights import fetch_again

Hold = Literal["merged", "4bit", "adapters"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reloaded:
    """A run in memory. `model` is a `PeftModel`, or the bare merged model where `hold` is merged.

    `data` is the fingerprint of what it learned from.
    """

    config: Config
    tokenizer: Any
    model: Any
    hold: Hold
    dtype: str
    stop_ids: tuple[int, ...]
    data: str

    @property
    def module(self) -> Any:
        """The transformers model itself, with the adapter merged into its layers or living inside them."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model


def open_run(run_dir: Path, hold: str, dtype: str, progress: Progress = lambda *_: None) -> Reloaded:
    """Load a finished run. `hold` and `dtype` may be `auto`; `progress` is told (stage, done, total).

    Raises `UserError` if the run is not finished, its base has changed, or it cannot be held that way.
    """
    manifest = rundir.read_finished(run_dir)
    config = check(manifest["config"])
    form = choose_hold(hold, config.adapter.method)
    if dtype == "auto":
        dtype = "bf16" if manifest["base"]["dtype"] == "bf16" and detect().has_bf16 else "fp32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    progress("fetching the base", 0, 3)
    weights = fetch_again(card(config.model.name), manifest["base"]["revision"])
    progress("loading the base", 1, 3)
    tokenizer = models.load_tokenizer(run_dir / "tokenizer", manifest["template"])
    base = models.load_base(weights.path, dtype, config.quant, device)
    progress("merging the adapter" if form == "merged" else "attaching the adapter", 2, 3)
    model = attach_saved(base, run_dir / "adapter", form, models.DTYPES[dtype])
    return Reloaded(config, tokenizer, model, form, dtype, tuple(manifest["stop_ids"]), manifest["data"])


def choose_hold(hold: str, method: str) -> Hold:
    """What `auto` means for this method; raises `UserError` where the asked form cannot be had."""
    if hold == "auto":
        return "4bit" if method == "qlora" else "merged"
    if hold == "4bit" and method != "qlora":
        raise UserError(f"HOLD=4bit serves qlora runs, this is a {method} run; try HOLD=merged")
    assert hold in ("merged", "4bit", "adapters"), hold
    return hold  # type: ignore[return-value]


def attach_saved(base: PreTrainedModel, folder: Path, hold: Hold, dtype: torch.dtype) -> Any:
    """The base with its saved adapter, merged or beside it, not trainable; every tensor of the file is checked.

    A 4-bit base is dequantised before a merge: that is the base that was trained. Rounding a merged weight back to four
    bits, or merging into the original base, would give another model.
    """
    with quiet():
        if hold == "merged" and getattr(base, "is_loaded_in_4bit", False):
            base = base.dequantize().to(dtype)
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
        methods.check_folder(model, folder)
        if hold == "merged":
            return model.merge_and_unload(safe_merge=True).eval()
    # PEFT loads an adapter in fp32; beside a bf16 base that would cost two casts a layer and a token.
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model.eval()
