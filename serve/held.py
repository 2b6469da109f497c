"""What a daemon holds: the base of its runs and their adapters, checked. The one file that imports `launcher`."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher import models, reload, rundir
from launcher.catalogue import card
from launcher.chat import prompt_ids
from launcher.compose import check
from launcher.config import Config, Quant
from launcher.errors import UserError
from launcher.hardware import detect
from launcher.memory import frozen_bytes
from launcher.weights import fetch_again
from serve import adapters, errors
from serve.adapters import WEIGHTS_FILE, Adapter
from serve.engine import AdapterError

Progress = Callable[[str, int, int], None]
# The same for every base and adapter, so that figures can be compared.
PROBE = [{"role": "user", "content": "Good morning! Two coffees and a slice of cake, please. What do you have today?"}]
DIGEST_LENGTH = 12


@dataclass
class Held:
    """A base in memory. `model` is a transformers model without adapters, or with the only one merged into it.

    `template` and `base` are digests that an adapter must have been trained with; `merge_kl` is how far merging moved the
    next token on the probe, in nats; `tokenizer` None answers token ids only (random weights have no words).
    """

    model: Any
    tokenizer: Any
    name: str
    hold: str
    dtype: str
    base: str = ""
    template: str = ""
    stop_ids: tuple[int, ...] = ()
    merged: Path | None = None
    merge_kl: float | None = None
    tuned_kl: float | None = None
    notes: tuple[str, ...] = ()

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of a conversation up to where the assistant speaks; raises `ValueError` (one line)."""
        try:
            return prompt_ids(self.tokenizer, messages)  # type: ignore[arg-type]
        except UserError as error:
            raise ValueError(str(error)) from None

    def read_adapter(self, run: Path, layers: Mapping[str, nn.Module]) -> tuple[str, Adapter]:
        """(digest of its file, adapter) of a finished run for these layers of the base; raises `AdapterError`."""
        try:
            manifest = rundir.read_finished(run)
        except UserError as error:
            raise AdapterError(str(error)) from None
        if (theirs := base_digest(manifest)) != self.base:
            raise AdapterError(
                f"{run} was trained on another base ({manifest['base']['name']}, {theirs[:DIGEST_LENGTH]}) than the one "
                f"that is held ({self.name}, {self.base[:DIGEST_LENGTH]}); serve it alone: make serve RUN={run}"
            )
        if manifest["template_sha256"] != self.template:
            raise AdapterError(f"{run} was trained with another chat template; serve it alone: make serve RUN={run}")
        with torch.inference_mode():
            adapter = adapters.read(run / "adapter", layers, self.model.config, models.DTYPES[self.dtype])
        return file_digest(run), adapter


def base_digest(manifest: dict[str, Any]) -> str:
    """What two runs must share to be served together: the weights of the base, and how they are quantised."""
    return f"{manifest['base']['digest']} {manifest['base']['quantisation'] or ''}".strip()


def file_digest(run: Path) -> str:
    """The beginning of the SHA-256 of a run's adapter file."""
    with (run / "adapter" / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH]


def hold_runs(
    runs: Sequence[Path],
    hold: str,
    dtype: str,
    memory: float,
    progress: Progress,
    device: int = 0,
    num_devices: int = 1,
) -> Held:
    """Load the base of these finished runs, and merge the only one into it if it shall be held so.

    `hold` and `dtype` may be `auto`. `memory` is the share of a GPU that may be used: a base that needs more is spread
    over `num_devices`. Raises `serve.errors.UserError`.
    """
    try:
        return _hold(runs, hold, dtype, memory, progress, device, num_devices)
    except UserError as error:
        raise errors.UserError(str(error)) from None


def _hold(
    runs: Sequence[Path], hold: str, dtype: str, memory: float, progress: Progress, device: int, num_devices: int
) -> Held:
    manifest = rundir.read_finished(runs[0])
    config = check(manifest["config"])
    form = reload.choose_hold("adapters" if len(runs) > 1 and hold == "auto" else hold, config.adapter.method)
    if dtype == "auto":
        dtype = "bf16" if manifest["base"]["dtype"] == "bf16" and detect().has_bf16 else "fp32"
    progress("fetching the base", 0, 3)
    weights = fetch_again(card(config.model.name), manifest["base"])
    tokenizer = models.load_tokenizer(runs[0] / "tokenizer", manifest["template"])
    rundir.require_template(manifest, tokenizer.chat_template)
    where, notes = _place(weights.path, config, dtype, memory, device, num_devices)
    progress("loading the base", 1, 3)
    model = models.load_base(weights.path, dtype, config.quant, where, is_served=True)
    held = Held(
        model, tokenizer, config.model.name, form, dtype, base_digest(manifest), manifest["template_sha256"],
        tuple(manifest["stop_ids"]), notes=notes,
    )  # fmt: skip
    if form == "merged":
        progress("merging the adapter", 2, 3)
        _merge(held, runs[0], config.quant)
    return held


def _place(
    weights: Path, config: Config, dtype: str, memory: float, device: int, num_devices: int
) -> tuple[torch.device | str, tuple[str, ...]]:
    """The device for the base, or "auto" for all of them together, and what should be said about it."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), ()
    size = models.DTYPES[dtype].itemsize
    needed = frozen_bytes(config, models.read_architecture(weights), size)
    room = torch.cuda.mem_get_info(device)[0] * memory
    if needed <= room or num_devices == 1:
        return torch.device("cuda", device), ()
    note = f"the base takes {needed / 2**30:.1f} GiB and one GPU has {room / 2**30:.1f}: spread over {num_devices} GPUs"
    return "auto", (note,)


@torch.inference_mode()
def _merge(held: Held, run: Path, quant: Quant) -> None:
    """Merge into the base that was trained, dequantised where it was in four bits, and measure what that changed."""
    dtype = models.DTYPES[held.dtype]
    untuned = probe(held, held.model)
    tuned = reload.load_adapter(held.model, run / "adapter")
    for parameter in reload.adapter_parameters(tuned):
        parameter.data = parameter.data.to(dtype)
    trained = probe(held, tuned)
    if quant.bits:
        with models.quiet():
            base = tuned.unload()
        held.model = reload.attach_saved(base, run / "adapter", "merged", dtype)
    else:
        with models.quiet():
            held.model = tuned.merge_and_unload(safe_merge=True).eval()
    held.merged, held.tuned_kl = run, kl(trained, untuned)
    held.merge_kl = kl(trained, probe(held, held.model))


def probe(held: Held, model: nn.Module) -> torch.Tensor:
    """Log-probabilities fp32 [L, vocabulary] of the next token after each token of the probe."""
    ids = torch.tensor([held.prompt_ids(PROBE)], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def kl(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean divergence of `other` from `one`, KL(one || other) in nats, of log-probabilities [L, vocabulary]."""
    value = (one.exp() * (one - other)).sum(-1).mean().item()
    # Rounding may leave a little less than nothing.
    return max(value, 0.0) if math.isfinite(value) else math.inf
