"""The chunked loss on trained positions equals the plain one on full logits: value and gradients, both architectures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, LlamaConfig, OPTConfig

from launcher import methods, models
from launcher.batches import collate, each_alone
from launcher.config import Adapter, Quant
from launcher.encoding import Example
from launcher.errors import UserError
from launcher.loss import CHUNK, Trainee


def batch(num_rows, length):
    return collate(each_alone(some_examples(num_rows, length)))


def some_examples(num_rows, length):
    generator = torch.Generator().manual_seed(1)
    examples = []
    for row in range(num_rows):
        n = length - row % 7
        ids = torch.randint(3, 600, (n,), generator=generator).tolist()
        examples.append(Example(np.array(ids, np.int32), np.arange(n) > n // 3))
    return examples


@pytest.mark.parametrize("method_args", [{}, {"r": 4, "targets": "all-linear"}])
def test_value_and_gradients_equal_the_plain_loss(tiny, method_args):
    model = methods.attach(AutoModelForCausalLM.from_pretrained(tiny), Adapter(**method_args))
    torch.manual_seed(0)
    for parameter in methods.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = batch(8, 64)
    assert inputs["trained"].sum() > CHUNK  # more than one chunk

    loss = Trainee(model)(**inputs)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in methods.trainable(model).items()}
    model.zero_grad()

    labels = inputs["input_ids"].masked_fill(~inputs["trained"], -100)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["documents"]).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    plain.backward()

    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-3)
    for name, parameter in methods.trainable(model).items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("targets", "says"), [(("q_prj",), "choose from: all-linear"), (("lm_head",), "head stays frozen")]
)
def test_targets_that_cannot_be_trained_are_refused(tiny, targets, says):
    with pytest.raises(UserError, match=says):
        methods.attach(AutoModelForCausalLM.from_pretrained(tiny), Adapter(targets=targets))


def test_only_the_adapter_is_trained_and_it_starts_at_the_base(tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny)
    inputs = batch(2, 32)
    with torch.no_grad():
        before = base(input_ids=inputs["input_ids"]).logits
        model = methods.attach(base, Adapter())
        assert torch.equal(model(input_ids=inputs["input_ids"]).logits, before)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in methods.trainable(model).items())


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix"])
def test_packed_rows_give_the_loss_and_gradients_of_padded_ones(tiny, method):
    examples = some_examples(8, 64)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = methods.attach(base, Adapter(method=method))
    for parameter in methods.trainable(model).values():
        torch.nn.init.normal_(parameter, mean=1.0 if method == "ia3" else 0.0, std=0.1)
    results = []
    for rows in (each_alone(examples), [examples[:3], examples[3:5], examples[5:]]):
        model.zero_grad()
        loss = Trainee(model)(**collate(rows))
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in methods.trainable(model).values()]))
    (padded, one), (packed, other) = results
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-3)
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing_changes_nothing_but_the_memory(tiny):
    inputs = batch(4, 48)
    gradients = []
    for is_on in (False, True):
        base = models.load_base(tiny, "fp32", Quant(), "cpu")
        if is_on:
            models.checkpoint_gradients(base)
        torch.manual_seed(0)
        trainee = Trainee(methods.attach(base, Adapter())).train()
        assert any(getattr(m, "gradient_checkpointing", False) and m.training for m in base.modules()) is is_on
        for name, parameter in methods.trainable(trainee).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        trainee(**inputs).backward()
        gradients.append([p.grad for p in methods.trainable(trainee).values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FORGETFUL = [
    GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64),
    LlamaConfig(**SMALL, intermediate_size=64, attention_dropout=0.5),
    OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.5, layerdrop=0.5),
    FalconConfig(**SMALL, attention_dropout=0.5, parallel_attn=False),
]


@pytest.mark.parametrize("config", FORGETFUL, ids=lambda config: config.model_type)
def test_a_frozen_base_forgets_nothing_at_random(tmp_path, config):
    stock = AutoModelForCausalLM.from_config(config)
    stock.save_pretrained(tmp_path)
    trainee = Trainee(methods.attach(models.load_base(tmp_path, "fp32", Quant(), "cpu"), Adapter())).train()
    inputs = {**batch(2, 16), "input_ids": torch.randint(3, 300, (2, 16))}
    once = trainee(**inputs)
    assert all(torch.equal(trainee(**inputs), once) for _ in range(4))
    stock = Trainee(methods.attach(stock, Adapter())).train()
    assert len({stock(**inputs).item() for _ in range(5)}) > 1
