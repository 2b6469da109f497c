"""Load tokenizer and base model the same way for training, evaluation and serving."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from launcher.config import Quant
from launcher.errors import UserError

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


def load_tokenizer(path: Path, template: str | None = None) -> Any:
    """The tokenizer of a model folder; `template` is used where the model has no chat template of its own."""
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    tokenizer.chat_template = tokenizer.chat_template or template
    if not tokenizer.chat_template:
        raise UserError(f"{path}: this model has no chat template; try a chat model, or add a card in configs/models/")
    return tokenizer


def context_length(path: Path) -> int:
    """The most tokens a model of this folder can read."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def load_base(path: Path, dtype: str, quant: Quant, device: torch.device | str) -> PreTrainedModel:
    """The frozen base model on `device`, in `dtype` or in four bits with `dtype` as compute type."""
    quantization = None
    if quant.bits:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.type,
            bnb_4bit_use_double_quant=quant.double,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=DTYPES[dtype],
                attn_implementation="sdpa",
                quantization_config=quantization,
                local_files_only=True,
                device_map={"": device} if quantization else None,
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be loaded ({str(error).splitlines()[0]}); try MODEL=smollm2-135m"
            ) from None
    if quantization is None:
        model.to(device)
    return model.requires_grad_(False).eval()
