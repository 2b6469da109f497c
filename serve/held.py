"""What a daemon holds: the base of its runs and their adapters, checked. The one file that imports `launcher`."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from launcher import models, reload, rundir
from launcher.chat import prompt_texts, tokenize
from launcher.config import Config, Quant
from launcher.errors import UserError
from launcher.memory import frozen_bytes
from serve import adapters, errors
from serve.adapters import DIGEST_LENGTH, WEIGHTS_FILE, Adapter
from serve.engine import AdapterError, TooLongError
from serve.load import Load
from serve.sizes import layer_devices
from serve.token_bytes import measure

Progress = Callable[[str, int, int], None]
# The same for every base and adapter, so that figures can be compared.
PROBE = [{"role": "user", "content": "Good morning! Two coffees and a slice of cake, please. What do you have today?"}]


@dataclass
class Held:
    """A base in memory. `model` is a transformers model without adapters, or with the only one merged into it.

    `template` and `base` are digests that an adapter must have been trained with; `merge_kl` is how far merging moved the
    next token on the probe, in nats; `system` is the system turn of the merged run; `tokenizer` None answers token ids only (random weights have no words).
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
    system: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._token_bytes = measure(self.tokenizer)

    def prompt_ids(self, messages: list[dict[str, Any]], context: int | None = None) -> list[int]:
        """The ids of a conversation up to where the assistant speaks; raises `ValueError` (one line).

        What cannot fit a `context` of so many tokens is not tokenised to its end, nor rendered: `TooLongError`.
        """
        ids: list[int] = []
        try:
            for text in prompt_texts(self.tokenizer, messages):  # type: ignore[arg-type]
                if context is not None and len(ids) + self._token_bytes.least_tokens(text) > context:
                    raise TooLongError
                ids += tokenize(self.tokenizer, text)
        except UserError as error:
            raise ValueError(str(error)) from None
        return ids

    def read_adapter(self, run: Path, layers: Mapping[str, nn.Module]) -> Adapter:
        """The adapter of a finished run for these layers of the base; raises `AdapterError`."""
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
        adapter.system = rundir.system(manifest)
        return adapter


def base_digest(manifest: dict[str, Any]) -> str:
    """What two runs must share to be served together: the weights of the base, and how they are quantised."""
    return f"{manifest['base']['digest']} {manifest['base']['quantisation'] or ''}".strip()


def file_digest(run: Path) -> str:
    """The beginning of the SHA-256 of a run's adapter file."""
    with (run / "adapter" / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH]


def hold_runs(load: Load, progress: Progress) -> Held:
    """Load the base of the runs, and merge the only one into it if it shall be held so; raises `serve.errors.UserError`."""
    run, hold, notes = Path(load.runs[0]), load.hold, []
    if torch.cuda.is_available():
        # Streams and graphs belong to the current device, and the first one is the current one until another is named.
        torch.cuda.set_device(load.device)

    def place(weights: Path, config: Config, dtype: str) -> torch.device | str:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        needed = frozen_bytes(config, models.read_architecture(weights), models.DTYPES[dtype].itemsize)
        room = torch.cuda.mem_get_info(load.device)[0] * load.settings.memory
        if needed <= room or load.num_devices == 1:
            return torch.device("cuda", load.device)
        sizes = f"the base takes {needed / 2**30:.1f} GiB and one GPU has {room / 2**30:.1f}"
        notes.append(f"{sizes}: spread over {load.num_devices} GPUs")
        return "auto"

    try:
        opened = reload.open_base(
            run, "adapters" if len(load.runs) > 1 and hold == "auto" else hold, load.dtype, progress, place
        )
        manifest = opened.manifest
        held = Held(
            opened.base, opened.tokenizer, opened.config.model.name, opened.hold, opened.dtype, base_digest(manifest),
            manifest["template_sha256"], tuple(manifest["stop_ids"]), notes=tuple(notes),
        )  # fmt: skip
        if opened.hold == "merged":
            progress("merging the adapter", 2, 3)
            held.system = rundir.system(manifest)
            _merge(held, run, opened.config.quant)
    except UserError as error:
        raise errors.UserError(str(error)) from None
    return held


def _merge(held: Held, run: Path, quant: Quant) -> None:
    """Merge into the base that was trained, dequantised where it was in four bits, and measure what that changed."""
    untuned = probe(held, held.model)
    tuned = reload.load_adapter(held.model, run / "adapter")
    trained = probe(held, tuned)
    with models.quiet():
        if quant.bits:
            held.model = reload.attach_saved(tuned.unload(), run / "adapter", "merged", models.DTYPES[held.dtype])
        else:
            held.model = tuned.merge_and_unload(safe_merge=True).eval()
    held.merged, held.tuned_kl = run, kl(trained, untuned)
    held.merge_kl = kl(trained, probe(held, held.model))


@torch.inference_mode()
def probe(held: Held, model: Any, prefix: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities fp32 [L, vocabulary] of the next token after each of the probe, behind a prefix if there is one."""
    ids = torch.tensor([held.prompt_ids(PROBE)], device=model.device)
    cache = DynamicCache()
    if prefix is not None:
        # Each layer finds its part where it lives itself: a base may be spread over several devices.
        for layer, (part, device) in enumerate(zip(prefix, layer_devices(model), strict=True)):
            cache.update(*part[:, None].to(device), layer)
    positions = cache.get_seq_length() + torch.arange(ids.shape[1], device=ids.device)[None]
    logits = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
    return logits[0].float().log_softmax(-1)


def kl(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean divergence of `other` from `one`, KL(one || other) in nats, of log-probabilities [L, vocabulary]."""
    value = (one.exp() * (one - other)).sum(-1).mean().item()
    # Rounding may leave a little less than nothing.
    return max(value, 0.0) if math.isfinite(value) else math.inf
