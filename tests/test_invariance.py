"""The loss means the same everywhere: over processes, accumulation and packing, and beside a loop with nothing of ours."""

import itertools
import json
import math

import pytest
import torch

from launcher import batches, data, models
from launcher.config import Data
from launcher.report import read_metrics
from tests.running import run_python

SIZE = 8
SMALL = ["model.dtype=fp32", f"batch.size={SIZE}", "optim.lr=1e-2", "eval.examples=1", "eval.answers=0"]
WAYS = list(itertools.product((1, 2), (1, 2, 4), ("on", "off")))


@pytest.fixture(scope="module")
def small(tiny_llama, orders):
    return [f"MODEL={tiny_llama}", f"DATA={orders}", *SMALL]


def train(run, *args):
    done = run_python("-m", "launcher", "train", f"RUN={run}", *args)
    assert done.returncode == 0, done.stderr
    return read_metrics(run), json.loads((run / "run.json").read_text())["training"]


def shared_out(small, run, world, accumulation, packing):
    """The same twenty steps in one of the ways to share them out."""
    micro = SIZE // world // accumulation
    args = [f"NGPU={world}", f"batch.micro={micro}", f"batch.packing={packing}", "optim.max_steps=20", "optim.epochs=3"]
    return train(run, *small, *args)


@pytest.fixture(scope="module")
def reference(small, tmp_path_factory):
    """In one process, all at once, unpacked."""
    return shared_out(small, tmp_path_factory.mktemp("whole") / "run", 1, 1, "off")


@pytest.mark.slow
@pytest.mark.parametrize(("world", "accumulation", "packing"), WAYS)
def test_twenty_steps_are_the_same_however_they_are_shared_out(
    small, tmp_path, reference, world, accumulation, packing
):
    is_reference = (world, accumulation, packing) == (1, 1, "off")
    found, training = reference if is_reference else shared_out(small, tmp_path / "run", world, accumulation, packing)
    assert (training["world_size"], training["accumulation"]) == (world, accumulation)
    assert training["packing"] is (packing == "on")
    assert training["engine"] == ("DeepSpeedEngine" if world > 1 else "Trainee")
    losses = [record["loss"] for record in found]
    assert len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]
    # AdamW learns the same from a gradient that is twice as long, so its norm is held against the reference as well.
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in found] == pytest.approx([record[name] for record in reference[0]], rel=1e-3)


@pytest.mark.slow
def test_fifty_steps_equal_those_of_plain_peft_and_torch(small, tiny_llama, orders, tmp_path):
    found, _ = train(tmp_path / "run", *small, "optim.max_steps=50", "optim.epochs=10")
    ours = [record["loss"] for record in found]
    assert ours == pytest.approx(plain_losses(tiny_llama, orders, num_steps=50), abs=1e-4)
    assert ours[-1] < 0.8 * ours[0]


def plain_losses(folder, orders, num_steps):
    """What a textbook writes: the template's own ids, labels of -100, the model's own loss, AdamW, clipping, a schedule."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with models.quiet():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    encoded = [plain_example(tokenizer, messages) for messages in data.read(Data(source=str(orders))).train]
    warmup, losses = math.ceil(0.03 * num_steps), []
    for step in range(num_steps):
        rate = (
            (step + 1) / warmup
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))
        )
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        chosen = [encoded[i] for i in batches.order(len(encoded), SIZE, step, seed=0)]
        length = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in chosen])
        labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in chosen])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in chosen])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_example(tokenizer, messages):
    """(ids, labels): the answer and its stop token carry loss, the newline that the template adds does not."""
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    stop = len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)
    return ids, [token if len(prompt) <= i <= stop else -100 for i, token in enumerate(ids)]
