"""Read an adapter's folder, in the format of PEFT, into what each layer of the base needs to serve it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load
from torch import nn

from serve.cache import heads_of
from serve.engine import AdapterError
from serve.layers import Part

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Digits of a SHA-256 that tell adapters apart.
DIGEST_LENGTH = 12
_HEAD = "base_model.model."
# What our methods leave at these values; an adapter from elsewhere that uses them would be served wrongly.
_UNUSED = ("alpha_pattern", "rank_pattern", "modules_to_save", "layer_replication", "trainable_token_indices")


@dataclass
class Adapter:
    """What an adapter does to the base: parts by the name of the layer, or a prefix [layers, 2, heads, tokens, dim].

    `digest` is of the very bytes that were read; `system` is the system turn that it was trained with, "" for none.
    """

    method: str
    parts: dict[str, Part] = field(default_factory=dict)
    prefix: torch.Tensor | None = None
    matched: int = 0
    total: int = 0
    digest: str = ""
    system: str = ""

    @property
    def num_prefix(self) -> int:
        """How many positions its prefix takes at the head of a row."""
        return 0 if self.prefix is None else self.prefix.shape[3]


def read(folder: Path, layers: Mapping[str, nn.Module], model_config: Any, dtype: torch.dtype) -> Adapter:
    """The adapter of a folder for the layers of a base, in `dtype` on their devices.

    Raises `AdapterError` unless every tensor is finite and finds its place.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        # Not mapped: what is served must not change with the file.
        data = (folder / WEIGHTS_FILE).read_bytes()
        tensors = load(data)
    except Exception as fault:
        raise AdapterError(f"{folder} cannot be read ({fault}); train again: RUN=another") from None
    if used := [name for name in _UNUSED if config.get(name)]:
        raise AdapterError(f"{folder} uses {used[0]}, which is not served; try an adapter without it")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{folder}: {name} is not finite (NaN or infinite); train again: RUN=another")
    method = str(config.get("peft_type", "")).lower()
    if method == "prefix_tuning":
        adapter = _read_prefix(tensors, model_config, dtype)
    else:
        adapter = _read_layers(method, config, tensors, layers, dtype)
    adapter.digest = hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]
    return adapter


def layers_of(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The layers that adapters change: all that multiply by a weight, but the head and the embeddings."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is not head and hasattr(module, "weight") and _sizes(module) is not None:
            yield name, module


def _read_prefix(tensors: Mapping[str, torch.Tensor], model_config: Any, dtype: torch.dtype) -> Adapter:
    heads, head_dim = heads_of(model_config)
    num_layers = model_config.num_hidden_layers
    flat = tensors.get("prompt_embeddings")
    if flat is None or flat.dim() != 2 or flat.shape[1] != 2 * num_layers * heads * head_dim:
        raise AdapterError(f"this prefix is not one of {model_config.model_type}; try a run of this base")
    # PEFT keeps [tokens, layers x (key, value) x heads x head_dim].
    shaped = flat.view(len(flat), num_layers, 2, heads, head_dim).permute(1, 2, 3, 0, 4)
    return Adapter("prefix", prefix=shaped.to(dtype).contiguous(), matched=1, total=len(tensors))


def _read_layers(
    method: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, nn.Module],
    dtype: torch.dtype,
) -> Adapter:
    adapter = Adapter(method, total=len(tensors))
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.removeprefix(_HEAD).removesuffix(".weight").rpartition(".")
        by_layer.setdefault(layer, {})[kind] = tensor
    for layer, named in by_layer.items():
        base = layers.get(layer)
        part = None if base is None else _part(config, named, base)
        if part is None:
            continue
        device = base.weight.device  # type: ignore[union-attr]
        moved = {key: t.to(device, dtype) for key, t in vars(part).items() if t is not None}
        adapter.parts[layer] = Part(**moved)
        adapter.matched += len(named)
    if adapter.matched < adapter.total:
        lost = adapter.total - adapter.matched
        raise AdapterError(f"{lost} of {adapter.total} tensors have no place in this base; try a run of this base")
    return adapter


def _part(config: Mapping[str, Any], named: Mapping[str, torch.Tensor], base: nn.Module) -> Part | None:
    """What these tensors do to the layer; None if they are not what we know, or do not fit it."""
    sizes = _sizes(base)
    assert sizes is not None
    num_in, num_out = sizes
    if set(named) == {"ia3_l"}:
        vector = named["ia3_l"].flatten()
        # Feed-forward layers have their input scaled, [1, in]; the others their output, [out, 1].
        is_input = named["ia3_l"].shape[0] == 1
        if len(vector) != (num_in if is_input else num_out):
            return None
        return Part(in_scale=vector) if is_input else Part(out_scale=vector)
    if not {"lora_A", "lora_B"} <= set(named) <= {"lora_A", "lora_B", "lora_magnitude_vector"}:
        return None
    a, b = named["lora_A"].float(), named["lora_B"].float()
    rank = len(a)
    if a.shape != (rank, num_in) or b.shape != (num_out, rank):
        return None
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    part = Part(a=a, b=(b * scaling).t())
    if "lora_magnitude_vector" in named:
        _decompose(part, named["lora_magnitude_vector"].float(), base)
    return part


def _decompose(part: Part, magnitude: torch.Tensor, base: Any) -> None:
    """DoRA (arXiv:2402.09353): the adapted weight has its rows brought to the trained lengths, the bias untouched."""
    assert part.a is not None and part.b is not None
    weight = dequantize_module_weight(base).float().cpu()
    weight = weight.t() if hasattr(base, "nf") else weight
    scale = magnitude / (weight + part.b.t() @ part.a).norm(dim=1)
    part.b = part.b * scale
    part.out_scale = scale
    if base.bias is not None:
        part.shift = (1 - scale) * base.bias.float().cpu()


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that multiplies by a weight, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    # GPT-2's Conv1D keeps its weight the other way round, and says so in `nx` and `nf`.
    if hasattr(module, "nf") and hasattr(module, "nx"):
        return module.nx, module.nf
    return None
