"""Load tokenizer and base model the same way for training, evaluation and serving."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from launcher.architecture import ALIASES, Architecture, read
from launcher.config import Quant
from launcher.errors import UserError
from launcher.shards import is_sharded

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@contextlib.contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Keep the libraries' own notices, and their progress bars unless wanted, off the user's screen."""
    verbosity, disabled = transformers_logging.get_verbosity(), logging.root.manager.disable
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    if not bars:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        logging.disable(disabled)
        transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _reading(path: Path, part: str) -> Iterator[None]:
    """Let the libraries read in silence; raises `UserError` for a folder whose `part` they cannot make anything of."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: the {part} cannot be loaded ({reason}); try a complete copy of it, or MODEL=smollm2-135m"
        ) from None


def load_tokenizer(path: Path, template: str | None = None) -> Any:
    """The tokenizer of a model folder; `template` stands in place of its own chat template."""
    with _reading(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise UserError(f"{path}: this model has no chat template; try a chat model, or add a card in configs/models/")
    return tokenizer


def read_architecture(path: Path) -> Architecture:
    """The architecture of the model in a folder, with every default that transformers knows."""
    with _reading(path, "configuration"):
        config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    named = {key: getattr(config, key, None) for key in ALIASES}
    return read({**config.to_dict(), **named})


def count_parameters(path: Path) -> int:
    """The parameters of the model in a folder, counted on a model without weights; for families without a formula."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with quiet(), torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def load_base(
    path: Path, dtype: str, quant: Quant, device: torch.device | str, *, is_served: bool = False
) -> PreTrainedModel:
    """The frozen base model on `device`, in `dtype` or in four bits with `dtype` as compute type.

    Raises `UserError` for a folder that cannot be loaded wholly. `device` "auto" spreads its layers over all GPUs.

    A 4-bit base that `is_served` may use kernels that have no gradient.
    """
    quantization = None
    if quant.bits:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.type,
            bnb_4bit_use_double_quant=quant.double,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    with _reading(path, "base"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            quantization_config=quantization,
            local_files_only=True,
            device_map="auto" if device == "auto" else {"": device} if quantization else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
    _require_whole(path, model, loading["missing_keys"], {name for name, *_ in loading["mismatched_keys"]})
    if quantization is None and device != "auto" and not any(map(is_sharded, model.parameters())):
        model.to(device)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and not (is_served and dtype == "bf16"):
            # On some processors bitsandbytes repacks a weight for good when it is first used in eval mode. The packed
            # kernel computes in bf16 and passes no gradient back: training after an evaluation would be silently wrong.
            module.support_avx512bf16_for_cpu = False
        _drop_nothing(module)
    return model.requires_grad_(False).eval()


def _require_whole(path: Path, model: PreTrainedModel, missing: set[str], misshapen: set[str]) -> None:
    """Refuse a base with weights that are not in its files: transformers has filled them with random numbers."""
    # Not the buffers, which a model computes for itself; of tied weights only one has a name here.
    names = sorted((missing | misshapen) & dict(model.named_parameters()).keys())
    if names:
        fault = "have another shape of" if names[0] in misshapen else "lack"
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{path}: its files {fault} {names[0]}{more}; try a complete copy of it, or MODEL=smollm2-135m")


def _drop_nothing(module: torch.nn.Module) -> None:
    """Zero the rates of all dropout, be it a module or a function whose rate stands in the module or its configuration.

    What is dropped at random in a frozen base is noise and no lesson; the adapter has a dropout of its own.
    """
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
    for holder in (module, getattr(module, "config", None)):
        for name, value in getattr(holder, "__dict__", {}).items():
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, 0.0)


def checkpoint_gradients(base: PreTrainedModel) -> None:
    """Keep no activations of the decoder's layers, compute them again in the backward pass (arXiv:1604.06174)."""
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
