"""A base that is spread over several GPUs: how much fits, and where a prefix goes."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from serve.cache import heads_of
from serve.held import Held, probe
from serve.sizes import free_for_rows, layer_devices
from tests.conftest import tiny_model

GIB = 2**30


def test_rows_are_as_many_as_fit_the_fullest_device(monkeypatch):
    free = {0: 12 * GIB, 1: 6 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 16 * GIB))
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert free_for_rows([first] * 4, 1.0) == 12 * GIB
    # Half of each row lies on the second, where half as much is free.
    assert free_for_rows([first] * 2 + [second] * 2, 1.0) == 12 * GIB
    assert free_for_rows([first] + [second] * 3, 1.0) == 8 * GIB
    # A quarter of all of its memory is to stay free on each.
    assert free_for_rows([first] * 3 + [second], 0.75) == 8 * GIB


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_layer_reads_its_part_of_a_prefix_where_it_lives(family, tokenizer):
    """A device without numbers stands for a second GPU: a tensor that meets one of the first device there fails as well."""
    other = torch.device("meta")
    model = tiny_model(family).eval()
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    norm = model.base_model.norm if family == "llama" else model.base_model.ln_f
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for module in (*layers[1:], norm, model.lm_head):
        add_hook_to_module(module.to(other), AlignDevicesHook(execution_device=other))
    assert [device.type for device in layer_devices(model)] == ["cpu", "meta"]
    heads, head_dim = heads_of(model.config)
    held = Held(model, tokenizer, family, "adapters", "fp32")
    logits = probe(held, model, torch.zeros(len(layers), 2, heads, 5, head_dim))
    assert logits.shape == probe(held, model).shape and logits.device == other
