"""The PEFT methods: what is attached to the frozen base, and how it is read back. docs/methods.md compares them."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prompt_embeddings_from_past_key_values,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD
from safetensors.torch import save_file
from torch.nn import Linear
from transformers import Cache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from launcher.config import Adapter
from launcher.encoding import Example
from launcher.errors import UserError
from launcher.models import quiet
from launcher.rundir import ADAPTER_FILE

# What PEFT calls the parameters of our methods.
PREFIX = "prompt_embeddings"
PARAMETER_NAMES = ("lora_", "ia3_", "prompt_encoder")


def attach(base: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """A `PeftModel` whose adapter parameters are fp32 and trainable, the base frozen.

    Raises `UserError` for what this base cannot do.
    """
    _require_plain_logits(base)
    try:
        with quiet():
            model = get_peft_model(base, _peft_config(base, adapter))
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, Linear | Conv1D)})
        reason = str(error).splitlines()[0]
        raise UserError(f"adapter.targets: {reason}; choose from: all-linear, {', '.join(names)}") from None
    if any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters()):
        raise UserError("adapter.targets: the head stays frozen, the loss relies on it; try adapter.targets=all-linear")
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


def _peft_config(base: PreTrainedModel, adapter: Adapter) -> PeftConfig:
    targets = adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets)
    # GPT-2 keeps its weights transposed in Conv1D modules.
    is_transposed = any(isinstance(module, Conv1D) for module in base.modules())
    if adapter.method == "prefix":
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=adapter.num_tokens,
            prefix_projection=adapter.projection,
            encoder_hidden_size=base.config.hidden_size,
        )
    if adapter.method == "ia3":
        # Full names for both: PEFT would save `all-linear` as full names and then not find the others among them.
        scaled = _linears(base, None if adapter.targets == "all-linear" else adapter.targets)
        inputs = _linears(base, adapter.feedforward or _feedforward(base))
        return IA3Config(
            task_type="CAUSAL_LM",
            target_modules=scaled,
            feedforward_modules=[name for name in inputs if name in scaled],
            fan_in_fan_out=is_transposed,
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        target_modules=targets,
        fan_in_fan_out=is_transposed,
    )


def _linears(base: PreTrainedModel, endings: Sequence[str] | None) -> list[str]:
    """The full names of the linear layers but the head, of all or of those whose name ends so."""
    head = base.get_output_embeddings()
    names = [name for name, m in base.named_modules() if isinstance(m, Linear | Conv1D) and m is not head]
    if endings is None:
        return names
    if unknown := [end for end in endings if not any(f".{name}".endswith(f".{end}") for name in names)]:
        raise ValueError(f"no module is named {unknown[0]}")
    return [name for name in names if any(f".{name}".endswith(f".{end}") for end in endings)]


def _feedforward(base: PreTrainedModel) -> Sequence[str]:
    known = IA3_FEEDFORWARD.get(base.config.model_type)
    if known is None:
        raise UserError(
            f"adapter.feedforward: not known for {base.config.model_type}; name the modules that end its feed-forward "
            "blocks, for example adapter.feedforward=[down_proj]"
        )
    return known


@torch.no_grad()
def prefix_from_text(
    model: PeftModel, examples: Sequence[Example], num_tokens: int, device: torch.device
) -> torch.Tensor:
    """The keys and values that the base has after reading the first examples, [num_tokens, layers x 2 x heads x dim].

    A random prefix is noise that attention must first learn to ignore; this one begins as a few-shot prompt.
    """
    ids = itertools.islice(itertools.chain.from_iterable(itertools.cycle([e.ids for e in examples])), num_tokens)
    read = model.get_base_model()(input_ids=torch.tensor([list(ids)], device=device), use_cache=True)
    return prompt_embeddings_from_past_key_values(read.past_key_values, num_virtual_tokens=num_tokens)


def bare(model: Any) -> PreTrainedModel:
    """The transformers model itself, whether an adapter is around it or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def num_prefix(model: Any) -> int:
    """How many positions the adapter takes at the head of every sequence: 0 but for prefix tuning."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return config.num_virtual_tokens if config and config.is_prompt_learning else 0


def prefix_cache(model: Any, batch_size: int) -> Cache | None:
    """The trained keys and values, [batch, heads, tokens, head_dim] a layer, which a forward pass begins with.

    None for every method but prefix tuning, and for a bare model.
    """
    return model.get_prompt(batch_size) if num_prefix(model) else None


def _require_plain_logits(base: PreTrainedModel) -> None:
    """Refuse models that change the logits after the head: the loss would not be theirs."""
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if getattr(base.config, name, None) not in (None, 1):
            raise UserError(f"this model scales its logits ({name}), which cannot be trained yet; try another MODEL")


def saved_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The active adapter's tensors under the names that PEFT's files give them."""
    config = model.active_peft_config
    if config.is_prompt_learning and not config.prefix_projection:
        # PEFT would run the embedding as a module, which under ZeRO-3 takes all processes.
        return {PREFIX: model.prompt_encoder[model.active_adapter].embedding.weight}
    return get_peft_model_state_dict(model, adapter_name=model.active_adapter)


def save(model: PeftModel, folder: Path) -> None:
    """Write the standard PEFT folder of the active adapter, as `save_pretrained` does but for its model card."""
    folder.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in saved_tensors(model).items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = copy.copy(model.active_peft_config)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def saved_name(parameter: str) -> str:
    """The name in PEFT's files of a trained parameter of a `PeftModel`."""
    return PREFIX if "prompt_encoder" in parameter else parameter.replace(".default", "")


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
