"""The chunked loss on trained positions equals the plain one on full logits: value and gradients, both architectures."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from launcher import methods
from launcher.batches import collate
from launcher.config import Adapter
from launcher.encoding import Example
from launcher.errors import UserError
from launcher.loss import CHUNK, Trainee


def batch(num_rows, length):
    generator = torch.Generator().manual_seed(1)
    examples = []
    for row in range(num_rows):
        n = length - row % 7
        ids = torch.randint(3, 600, (n,), generator=generator).tolist()
        examples.append(Example(ids, [position > n // 3 for position in range(n)]))
    return collate(examples)


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
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
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
