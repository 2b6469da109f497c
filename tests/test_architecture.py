"""The sizes of a model from its config.json: as many parameters and the same linear layers as transformers builds."""

import sys

import pytest

from launcher.architecture import FAMILIES, Linear, read, read_file
from launcher.catalogue import card
from launcher.errors import UserError

LLAMA = {"model_type": "llama", "vocab_size": 32000}
QWEN = {"vocab_size": 151936, "num_hidden_layers": 24, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "vocab_size": 50257}
CONFIGS = {
    "gpt-2": {**GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt-2-xl": {**GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "n_inner": None},
    "llama-2-7b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-2-13b": {**LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-2-70b": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    "smollm2-135m": {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "with biases": {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "attention_bias": True, "mlp_bias": True},
    "mistral-7b": {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "qwen2-0.5b": {**QWEN, "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    "qwen3-0.6b": {**QWEN, "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8},
    "gemma-2b": {"model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1},
    "phi-3-mini": {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32},
}  # fmt: skip
SMALL = CONFIGS["with biases"]


def built(config):
    """The model that transformers makes of a config, without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_linear_layers_are_those_of_transformers(name):
    model, architecture = built(CONFIGS[name]), read(CONFIGS[name])
    assert architecture.is_known
    assert architecture.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    ours = {x.name: {x.inputs, x.outputs} for x in architecture.linears()}
    theirs = {
        name: set(module.weight.shape)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not model.get_output_embeddings()
    }
    assert ours == theirs and list(ours) == list(theirs)


def test_what_config_json_leaves_out_is_what_transformers_fills_in():
    from transformers import AutoConfig

    for config in CONFIGS.values():
        filled = AutoConfig.for_model(**config).to_dict()
        assert read(config) == read(filled)
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


def test_a_model_that_also_sees_is_read_by_its_text_part():
    assert read({"model_type": "llava", "text_config": SMALL, "vision_config": {"hidden_size": 9}}) == read(SMALL)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_size_is_told_in_one_line(key):
    with pytest.raises(UserError) as error:
        read({k: v for k, v in SMALL.items() if k != key})
    assert error.value.faults == (f"config.json of this llama model: {key} is missing; try MODEL=smollm2-135m",)


def test_a_size_that_is_none_is_told():
    with pytest.raises(UserError, match="hidden_size is '64', not a size; try"):
        read({**SMALL, "hidden_size": "64"})


def test_a_broken_file_is_told(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read .*; try a folder written by save_pretrained"):
        read_file(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        read_file(tmp_path)
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        read_file(tmp_path)


@pytest.mark.parametrize(
    ("keys", "is_local"),
    [
        ({}, False),
        ({"sliding_window": 128}, True),
        ({"sliding_window": None}, False),
        ({"sliding_window": 128, "use_sliding_window": False}, False),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"layer_types": ["chunked_attention"]}, True),
    ],
)
def test_windows_are_seen(keys, is_local):
    assert read({**SMALL, **keys}).is_local == is_local


def test_mistral_has_its_window_until_it_is_told_otherwise():
    assert read(CONFIGS["mistral-7b"]).is_local
    assert not read({**CONFIGS["mistral-7b"], "sliding_window": None}).is_local


def test_cards_say_what_the_model_is(smollm2):
    assert read(card("smollm2-135m").config) == read_file(smollm2)
    assert read(card("gpt-2").config).num_parameters == 124_439_808
    assert read(card("llama-7b").config).num_parameters == 6_738_415_616


def test_the_folder_of_a_tiny_model(tiny):
    from launcher.models import count_parameters, read_architecture

    assert read_architecture(tiny) == read_file(tiny)
    assert count_parameters(tiny) == read_file(tiny).num_parameters
    assert (read_architecture(tiny).context, read_architecture(tiny).width) == (512, 64)


@pytest.mark.parametrize("family", ["mamba", "opt", "falcon"])
def test_other_families_are_counted_not_computed(family, tmp_path):
    from transformers import AutoConfig

    from launcher.models import count_parameters, read_architecture

    config = AutoConfig.for_model(family, vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    found = read_architecture(tmp_path)
    assert not found.is_known and (found.width, found.num_layers, found.vocabulary) == (64, 2, 100)
    assert found.context == getattr(config, "max_position_embeddings", sys.maxsize)
    assert count_parameters(tmp_path) == sum(p.numel() for p in built(config.to_dict()).parameters())


def test_linear_layers_know_what_they_read():
    first = next(read(SMALL).linears())
    assert first == Linear("model.layers.0.self_attn.q_proj", 0, "hidden", 64, 64, has_bias=True)
    assert [x.source for x in read(SMALL).linears()][:7] == ["hidden"] * 3 + ["heads"] + ["mixed"] * 2 + ["inner"]
