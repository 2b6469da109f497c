"""What is known of a model without its weights: config.json -> sizes, linear layers, number of parameters. Free of torch.

The formulas are tested for the families of `FAMILIES` against the models that transformers builds. Any other model is read
as if it were a Llama of its sizes, and its plan says so; `is_known` tells.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import SHORTEST
from launcher.errors import UserError


@dataclass(frozen=True)
class Family:
    """What config.json does not say of an architecture, because transformers has it in code.

    `defaults` are the values of keys that config.json may leave out, `biased` the linear layers that always have a bias.
    """

    defaults: Mapping[str, Any]
    biased: tuple[str, ...] = ()
    layers: str = "model.layers"
    has_qk_norm: bool = False


FAMILIES = {
    "llama": Family({"max_position_embeddings": 2048}),
    "mistral": Family({"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family({"max_position_embeddings": 32768, "use_sliding_window": False}, ("q_proj", "k_proj", "v_proj")),
    "qwen3": Family(
        {"max_position_embeddings": 32768, "use_sliding_window": False, "head_dim": 128, "num_key_value_heads": 32},
        has_qk_norm=True,
    ),
    "gemma": Family(
        {"max_position_embeddings": 8192, "head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True}
    ),
    "phi3": Family({"max_position_embeddings": 4096}),
    "gpt2": Family(
        {"max_position_embeddings": 1024, "tie_word_embeddings": True},
        ("c_attn", "c_proj", "c_fc"),
        layers="transformer.h",
    ),
}
# The same size under the names that different families give it.
ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("n_inner", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
}


@dataclass(frozen=True)
class Linear:
    """A linear layer: its full name in the model, what it reads, and its weight of [outputs, inputs].

    Those of one layer that read the same `source` share it: `hidden` (before attention), `heads`, `mixed` (before the
    feed-forward block) or `inner`.
    """

    name: str
    layer: int
    source: str
    inputs: int
    outputs: int
    has_bias: bool


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model: `width` is the size of a hidden state, `inner` that of its feed-forward block.

    `context` counts the tokens it can read. `is_local`: some layers read only a window of what came before, of
    `window` tokens where config.json says so. `stored` is the dtype of its files.
    """

    family: str
    context: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    is_tied: bool
    is_local: bool
    stored: str
    window: int | None = None
    has_attention_bias: bool = False
    has_mlp_bias: bool = False

    @property
    def is_known(self) -> bool:
        """Whether the formulas are tested for this family."""
        return self.family in FAMILIES

    @property
    def is_gpt2(self) -> bool:
        """Whether the layers are GPT-2's: LayerNorm, learned positions, two MLP matrices; else they are Llama's."""
        return self.family == "gpt2"

    @property
    def is_fused(self) -> bool:
        """Whether one matrix makes queries, keys and values, which a rotation then copies."""
        return self.family == "phi3"

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normed head by head."""
        return self.family in FAMILIES and FAMILIES[self.family].has_qk_norm

    @property
    def longest_prefix(self) -> int:
        """The most tokens of a prefix that every layer sees, and that leave room for an example."""
        return min(self.context - SHORTEST, self.window - 1 if self.window else sys.maxsize)

    @property
    def queries(self) -> int:
        """Elements of a token's queries in one layer."""
        return self.num_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Elements of a token's keys in one layer; its values have as many."""
        return self.num_kv_heads * self.head_dim

    def linears(self) -> Iterator[Linear]:
        """Every linear layer but the head, in the order of the model."""
        traits = FAMILIES.get(self.family, FAMILIES["llama"])
        sizes = {"hidden": self.width, "heads": self.queries, "mixed": self.width, "inner": self.inner}
        for index in range(self.num_layers):
            for name, source, outputs in self._matrices():
                is_attention = source in ("hidden", "heads")
                has_bias = self.has_attention_bias if is_attention else self.has_mlp_bias
                has_bias = has_bias or name.rpartition(".")[2] in traits.biased
                yield Linear(f"{traits.layers}.{index}.{name}", index, source, sizes[source], outputs, has_bias)

    def _matrices(self) -> list[tuple[str, str, int]]:
        """(name within the layer, source, outputs) of one decoder layer."""
        width, inner, queries, keys = self.width, self.inner, self.queries, self.keys
        if self.is_gpt2:
            return [
                ("attn.c_attn", "hidden", queries + 2 * keys), ("attn.c_proj", "heads", width),
                ("mlp.c_fc", "mixed", inner), ("mlp.c_proj", "inner", width),
            ]  # fmt: skip
        if self.is_fused:
            return [
                ("self_attn.o_proj", "heads", width), ("self_attn.qkv_proj", "hidden", queries + 2 * keys),
                ("mlp.gate_up_proj", "mixed", 2 * inner), ("mlp.down_proj", "inner", width),
            ]  # fmt: skip
        return [
            ("self_attn.q_proj", "hidden", queries), ("self_attn.k_proj", "hidden", keys),
            ("self_attn.v_proj", "hidden", keys), ("self_attn.o_proj", "heads", width),
            ("mlp.gate_proj", "mixed", inner), ("mlp.up_proj", "mixed", inner), ("mlp.down_proj", "inner", width),
        ]  # fmt: skip

    @property
    def num_linear(self) -> int:
        """Weights of the linear layers but the head, without biases: what four bits hold."""
        return sum(linear.inputs * linear.outputs for linear in self.linears())

    @property
    def num_embedding(self) -> int:
        """Weights of the token embedding; the head has as many, or is the same."""
        return self.vocabulary * self.width

    @property
    def num_parameters(self) -> int:
        """All parameters, those of a tied head once."""
        norm = self.width * (2 if self.is_gpt2 else 1)
        norms = (2 * self.num_layers + 1) * norm + self.num_layers * self.has_qk_norm * 2 * self.head_dim
        biases = sum(linear.outputs for linear in self.linears() if linear.has_bias)
        positions = self.context * self.width if self.is_gpt2 else 0
        heads = 1 if self.is_tied else 2
        return heads * self.num_embedding + positions + self.num_linear + biases + norms


def read(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Hugging Face config.json; of its `text_config` where the model sees or hears too.

    Keys that may be left out get the values transformers gives them. Raises `UserError` for a size that is missing.
    """
    config = config.get("text_config") or config
    family = str(config.get("model_type", ""))
    values = _same_names(config, FAMILIES[family].defaults if family in FAMILIES else {})
    width, num_layers, vocabulary = (
        _size(values, family, key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    if family not in FAMILIES:
        # Nothing but a guess, for models that have no such sizes: `is_known` is false.
        values = {"num_attention_heads": max(1, width // 64), "intermediate_size": 4 * width} | values
    if family == "gpt2":
        values.setdefault("intermediate_size", 4 * width)
    num_heads = _size(values, family, "num_attention_heads")
    return Architecture(
        family=family,
        context=int(values.get("max_position_embeddings", sys.maxsize)),
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(values.get("num_key_value_heads", num_heads)),
        head_dim=int(values.get("head_dim", width // num_heads)),
        inner=_size(values, family, "intermediate_size"),
        vocabulary=vocabulary,
        is_tied=bool(values.get("tie_word_embeddings", False)),
        is_local=_is_local(values),
        stored=_stored(values),
        window=values.get("sliding_window") if _is_local(values) else None,
        has_attention_bias=bool(values.get("attention_bias", False)),
        has_mlp_bias=bool(values.get("mlp_bias", False)),
    )


def read_file(folder: Path) -> Architecture:
    """The architecture of the model in a folder. Raises `UserError` where its config.json cannot be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); try a folder written by save_pretrained") from None
    return read(config)


def _same_names(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are set, over the defaults, under one name whatever the family calls them."""
    values = dict(defaults)
    for key, others in ALIASES.items():
        given = [config[name] for name in (key, *others) if config.get(name) is not None]
        values |= {key: given[0]} if given else {}
    # A null is a value where it says "no window"; anywhere else it asks for the default.
    return values | {k: v for k, v in config.items() if k not in ALIASES and (v is not None or k == "sliding_window")}


def _size(values: Mapping[str, Any], family: str, key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        said = "is missing" if value is None else f"is {value!r}, not a size"
        raise UserError(f"config.json of this {family or 'unnamed'} model: {key} {said}; try MODEL=smollm2-135m")
    return value


def _stored(values: Mapping[str, Any]) -> str:
    """`bf16`, `fp16` or `fp32`, which is what files hold that do not say."""
    said = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    return said.replace("bfloat", "bf").replace("float", "fp")


def _is_local(values: Mapping[str, Any]) -> bool:
    kinds = values.get("layer_types") or ()
    has_window = bool(values.get("sliding_window")) and values.get("use_sliding_window", True)
    return has_window or any("sliding" in kind or "chunked" in kind for kind in kinds)
