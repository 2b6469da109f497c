"""Whose chat template is trained."""

from launcher import data
from launcher.config import Config
from launcher.config import Data as DataOptions
from launcher.material import load_material


def test_the_template_of_a_card_stands_in_place_of_the_models_own(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("AFINAR_CACHE", str(tmp_path))
    config = Config(data=DataOptions(limit=4, overflow="truncate"))
    splits = data.read(config.data)
    own = load_material(config, splits, tiny_llama, 512)
    other = "Orders:" + own.tokenizer.chat_template
    assert load_material(config, splits, tiny_llama, 512, other).tokenizer.chat_template == other
