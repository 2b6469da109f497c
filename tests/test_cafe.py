"""The embedded task: deterministic, disjoint splits, answers that say what was ordered."""

import hashlib
import json

from launcher import cafe


def orders(split):
    return list(cafe.examples(split))


def test_the_same_bytes_everywhere():
    blob = json.dumps(orders("train") + orders("held_out"), ensure_ascii=False).encode()
    assert hashlib.sha256(blob).hexdigest() == "390d2e715058fbe4abd85095613b74e40c12ff5a7379540bd748444d6b447be6"


def test_sizes_and_disjoint_splits():
    answers = {split: {e["messages"][1]["content"] for e in orders(split)} for split in ("train", "held_out")}
    assert len(answers["train"]) == cafe.NUM_TRAIN
    assert len(answers["held_out"]) == cafe.NUM_HELD_OUT
    assert not answers["train"] & answers["held_out"]


def test_no_held_out_order_is_in_training_under_any_seed():
    held_out = {e["messages"][1]["content"] for e in orders("held_out")}
    for seed in range(1, 4):
        assert not held_out & {e["messages"][1]["content"] for e in cafe.examples("train", seed)}


def test_every_word_of_an_answer_was_said():
    for example in orders("held_out"):
        said, order = example["messages"][0]["content"].lower(), json.loads(example["messages"][1]["content"])
        for line in order["items"]:
            noun = (cafe.DRINKS | cafe.FOODS)[line["item"]]
            assert any(word in said for word in (line["item"], noun.en_plural, noun.es, noun.es_plural))
            for extra in line.get("extras", []):
                assert extra in said or cafe.EXTRAS_ES[extra] in said


def test_spanish_agrees_in_gender_and_number():
    line = {"item": "cookie", "qty": 1}
    assert cafe.say_spanish(_first(), {"items": [line], "to_go": True}).lower().count("una galleta") == 1


def _first():
    import random

    return random.Random(0)
