"""The PEFT methods: what is attached to the frozen base, and how it is read back."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import Linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from launcher.config import Adapter
from launcher.errors import UserError
from launcher.models import quiet


def attach(base: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """A `PeftModel` whose adapter parameters are fp32 and trainable, the base frozen.

    LoRA (arXiv:2106.09685): W x + (alpha / r) B A x, with B zero at the start, so training begins at the base model.
    """
    _require_plain_logits(base)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        # GPT-2 keeps its weights transposed in Conv1D modules.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    try:
        with quiet():
            model = get_peft_model(base, config)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, Linear | Conv1D)})
        reason = str(error).splitlines()[0]
        raise UserError(f"adapter.targets: {reason}; choose from: all-linear, {', '.join(names)}") from None
    if any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters()):
        raise UserError("adapter.targets: the head stays frozen, the loss relies on it; try adapter.targets=all-linear")
    return model


def _require_plain_logits(base: PreTrainedModel) -> None:
    """Refuse models that change the logits after the head: the loss would not be theirs."""
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if getattr(base.config, name, None) not in (None, 1):
            raise UserError(f"this model scales its logits ({name}), which cannot be trained yet; try another MODEL")


def check_folder(model: PeftModel, folder: Path) -> None:
    """Assert that the adapter file holds exactly the tensors of this model: every key, no empty tensor, no NaN."""
    saved = load_file(folder / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model)
    faults = [f"{name} is missing" for name in expected.keys() - saved.keys()]
    faults += [f"{name} is unknown" for name in saved.keys() - expected.keys()]
    faults += [f"{name} is empty" for name, tensor in saved.items() if tensor.numel() == 0]
    faults += [f"{name} is not finite" for name, tensor in saved.items() if not torch.isfinite(tensor).all()]
    if faults:
        raise ValueError(f"{folder}: {len(faults)} bad tensors, the first: {sorted(faults)[0]}")


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
