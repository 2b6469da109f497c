"""Read a finished run back: tokenizer, base and adapter, in the form in which they are measured or served."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from launcher import gate, methods, models, rundir
from launcher.catalogue import card
from launcher.compose import check
from launcher.config import Config
from launcher.errors import UserError
from launcher.hardware import detect
from launcher.models import quiet
from launcher.rundir import ADAPTER_FILE
from launcher.weights import fetch_again

SWAPPED = "saved"
Hold = Literal["merged", "4bit", "adapters"]
Progress = Callable[[str, int, int], None]
# Where the base goes, by the folder of its weights, the configuration and the dtype: a device, or "auto" for all GPUs.
Place = Callable[[Path, Config, str], torch.device | str]


@dataclass(frozen=True)
class Opened:
    """A finished run without its adapter: what it says of itself, how it will be held, and its base in memory."""

    manifest: dict[str, Any]
    config: Config
    hold: Hold
    dtype: str
    tokenizer: Any
    base: PreTrainedModel


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
        return methods.bare(self.model)

    @property
    def context(self) -> int:
        """The most tokens that the model can read."""
        return int(self.module.config.max_position_embeddings)

    @contextlib.contextmanager
    def untuned(self) -> Iterator["Reloaded"]:
        """The same with its adapter out of the way; only for a run that is held beside its base."""
        if methods.num_prefix(self.model):
            yield replace(self, model=self.module)
        else:
            with self.model.disable_adapter():
                yield self


def open_run(run_dir: Path, hold: str, dtype: str, progress: Progress = lambda *_: None) -> Reloaded:
    """Load a finished run with its adapter; see `open_base`."""
    opened = open_base(run_dir, hold, dtype, progress)
    progress("merging the adapter" if opened.hold == "merged" else "attaching the adapter", 2, 3)
    model = attach_saved(opened.base, run_dir / "adapter", opened.hold, models.DTYPES[opened.dtype])
    stop_ids, data = tuple(opened.manifest["stop_ids"]), opened.manifest["data"]
    return Reloaded(opened.config, opened.tokenizer, model, opened.hold, opened.dtype, stop_ids, data)


def best_device(weights: Path, config: Config, dtype: str) -> torch.device | str:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_base(
    run_dir: Path, hold: str, dtype: str, progress: Progress = lambda *_: None, place: Place = best_device
) -> Opened:
    """Load the base and the tokenizer of a finished run. `hold` and `dtype` may be `auto`; `place` finds the device.

    `progress` is told (stage, done, total). Raises `UserError` if the run is not finished, its base has changed, or it
    cannot be held that way.
    """
    manifest = rundir.read_finished(run_dir)
    config = check(manifest["config"])
    form = choose_hold(hold, config.adapter.method)
    if dtype == "auto":
        dtype = "bf16" if manifest["base"]["dtype"] == "bf16" and detect().has_bf16 else "fp32"
    progress("fetching the base", 0, 3)
    weights = fetch_again(card(config.model.name), manifest["base"])
    progress("loading the base", 1, 3)
    tokenizer = models.load_tokenizer(run_dir / "tokenizer")
    rundir.require_template(manifest, tokenizer.chat_template)
    device = place(weights.path, config, dtype)
    base = models.load_base(weights.path, dtype, config.quant, device, is_served=True)
    return Opened(manifest, config, form, dtype, tokenizer, base)


def choose_hold(hold: str, method: str) -> Hold:
    """What `auto` means for this method; raises `UserError` where the asked form cannot be had."""
    if hold == "auto":
        return "4bit" if method == "qlora" else "adapters" if method == "prefix" else "merged"
    if hold == "merged" and method == "prefix":
        raise UserError("HOLD=merged: a prefix is keys and values, which no weight can take in; try HOLD=adapters")
    if hold == "4bit" and method != "qlora":
        raise UserError(f"HOLD=4bit serves qlora runs, this is a {method} run; try HOLD=merged")
    assert hold in ("merged", "4bit", "adapters"), hold
    return hold  # type: ignore[return-value]


def attach_saved(base: PreTrainedModel, folder: Path, hold: Hold, dtype: torch.dtype) -> Any:
    """The base with its saved adapter, merged or beside it.

    A 4-bit base is dequantised before a merge: that is the base that was trained. Rounding a merged weight back to four
    bits, or merging into the original base, would give another model.
    """
    if hold == "merged" and getattr(base, "is_loaded_in_4bit", False):
        with quiet():
            base = base.dequantize().to(dtype)
    model = load_adapter(base, folder)
    if hold == "merged":
        with quiet():
            return model.merge_and_unload(safe_merge=True).eval()
    # Beside a bf16 base an adapter in fp32 would cost two casts a layer and a token.
    for parameter in adapter_parameters(model):
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with the adapter of `folder` in fp32, not trainable; raises `IntegrityError` unless the two fit wholly."""
    with quiet():
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
        # PEFT makes the vectors of IA3 in the dtype of the base and rounds the file to it.
        for parameter in adapter_parameters(model):
            parameter.data = parameter.data.float()
        set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILE))
    gate.check_file(folder / ADAPTER_FILE, methods.saved_tensors(model))
    return model.eval()


def swap_adapter(model: PeftModel, folder: Path) -> PeftModel:
    """The same base with the adapter of `folder` in fp32 in place of the active one, which stays beside it."""
    with quiet():
        model.load_adapter(str(folder), SWAPPED, is_trainable=False)
        model.set_adapter(SWAPPED)
    gate.check_file(folder / ADAPTER_FILE, methods.saved_tensors(model))
    return model.eval()


def adapter_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    """The parameters of a reloaded adapter."""
    return [p for name, p in model.named_parameters() if any(kind in name for kind in methods.PARAMETER_NAMES)]
