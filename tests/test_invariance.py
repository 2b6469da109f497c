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
COMMON = [
    "model.dtype=fp32",
    f"batch.size={SIZE}",
    "optim.lr=1e-2",
    "data.limit=100",
    "eval.examples=1",
    "eval.answers=0",
]


def train(model, run, *args):
    done = run_python("-m", "launcher", "train", f"MODEL={model}", f"RUN={run}", *COMMON, *args)
    assert done.returncode == 0, done.stderr
    return [record["loss"] for record in read_metrics(run)], json.loads((run / "run.json").read_text())["training"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_steps_are_the_same_however_they_are_shared_out(tiny_llama, tmp_path):
    losses = {}
    for world, accumulation, packing in itertools.product((1, 2), (1, 2, 4), ("on", "off")):
        micro = SIZE // world // accumulation
        args = [
            f"NGPU={world}",
            f"batch.micro={micro}",
            f"batch.packing={packing}",
            "optim.max_steps=20",
            "optim.epochs=2",
        ]
        found, training = train(tiny_llama, tmp_path / f"{world}-{accumulation}-{packing}", *args)
        assert (training["world_size"], training["accumulation"]) == (world, accumulation)
        assert training["packing"] is (packing == "on")
        assert training["engine"] == ("DeepSpeedEngine" if world > 1 else "Trainee")
        losses[world, accumulation, packing] = found
    reference = losses[1, 1, "off"]
    assert len(reference) == 20
    assert reference[-1] < 0.9 * reference[0]
    for found in losses.values():
        assert found == pytest.approx(reference, rel=1e-3)


@pytest.mark.slow
def test_fifty_steps_equal_those_of_plain_peft_and_torch(tiny_llama, tmp_path):
    ours, _ = train(tiny_llama, tmp_path / "ours", "optim.max_steps=50", "optim.epochs=10")
    assert ours == pytest.approx(plain_losses(tiny_llama, num_steps=50), abs=1e-4)
    assert ours[-1] < 0.8 * ours[0]


def plain_losses(folder, num_steps):
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
    encoded = [plain_example(tokenizer, messages) for messages in data.read(Data(limit=100)).train]
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
