"""What comes from the hub."""

from huggingface_hub.utils import filter_repo_objects

from launcher.weights import HUB_IGNORE


def test_of_a_hub_model_only_the_weights_that_are_loaded_come_here():
    loaded = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    left = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "consolidated.00.pth",
            "original/params.json", "pytorch_model.bin", "modeling_own.py"]  # fmt: skip
    assert list(filter_repo_objects([*loaded, *left], ignore_patterns=HUB_IGNORE)) == loaded
