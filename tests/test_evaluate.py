"""An evaluation writes out only the answers that a reading does not decide, and finds the same as if it wrote all."""

import numpy as np
import pytest
import torch

from launcher import evaluate, models
from launcher.config import Config, Data
from launcher.data import Splits
from launcher.encoding import encode
from launcher.evaluate import examine, is_json, is_undecided
from launcher.material import Material
from launcher.measure import Reading, Said, answer, foreseen, share, share_exact
from launcher.reload import Reloaded

LATTE = '{"item":"latte"}'
# What is learned by heart, and answers to the same questions that are not.
LEARNED = {"one": LATTE, "two": '{"item":"tea"}', "three": "no JSON", "four": '{"item":"jam","qty":2}'}
OTHERS = {"one": LATTE[:-1] + ',"qty":1}', "two": '{"item"', "three": "no", "five": LATTE, "six": "Sí."}


def talk(asked, said):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


@pytest.fixture(scope="module")
def learned(tiny_llama):
    """(model, tokenizer) after some steps over `LEARNED`, until it says that by heart."""
    tokenizer = models.load_tokenizer(tiny_llama)
    model = models.load_base(tiny_llama, "fp32", Config().quant, torch.device("cpu"))
    model.requires_grad_(True)
    examples = examples_of(tokenizer, [talk(*pair) for pair in LEARNED.items()])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        model.zero_grad()
        ids = [torch.from_numpy(example.ids.astype("int64"))[None] for example in examples]
        sum(model(input_ids=i, labels=i).loss for i in ids).backward()
        optimizer.step()
    return model.eval(), tokenizer


def examples_of(tokenizer, conversations, longest=200, overflow="error"):
    places = ["x"] * len(conversations)
    return encode(tokenizer, conversations, places, Data(overflow=overflow), longest)


def examined(learned, conversations, longest=200, overflow="error"):
    model, tokenizer = learned
    stop_ids = (tokenizer.eos_token_id,)
    held_out = examples_of(tokenizer, conversations, longest, overflow)
    material = Material(Splits(conversations, conversations), tokenizer, held_out, held_out, stop_ids, longest)
    run = Reloaded(Config(), tokenizer, model, "adapters", "fp32", stop_ids, "")
    return examine("tuned", run, material), run


@pytest.mark.parametrize(("longest", "overflow"), [(200, "error"), (45, "truncate")], ids=["whole", "some of them cut"])
def test_it_finds_what_writing_every_answer_finds(learned, monkeypatch, longest, overflow):
    monkeypatch.setattr(evaluate, "NUM_SHOWN", 0)
    pairs = [*LEARNED.items(), *OTHERS.items()]
    conversations = [talk(*pair) for pair in pairs]
    conversations.append([*talk("one", LATTE), *talk("two", LEARNED["two"])])
    found, run = examined(learned, conversations, longest, overflow)
    written = answer(run.model, run.tokenizer, conversations, run.stop_ids, run.model.device)
    right = [messages[-1]["content"] for messages in conversations]
    assert found["exact_match"] == share_exact(written, right)
    assert 0 < found["exact_match"] < 1
    for sample, text in zip(found["samples"], written, strict=True):
        assert sample["answered"] == text if sample["is_whole"] else text.startswith(sample["answered"])


def test_the_share_of_json_is_that_of_written_answers(learned, monkeypatch):
    monkeypatch.setattr(evaluate, "NUM_SHOWN", 0)
    conversations = [talk(*pair) for pair in [*LEARNED.items(), *OTHERS.items()] if is_json(pair[1])]
    found, run = examined(learned, conversations)
    written = answer(run.model, run.tokenizer, conversations, run.stop_ids, run.model.device)
    assert found["valid_json"] == share(map(is_json, written)) > 0
    assert found["exact_match"] < found["valid_json"]


def test_an_answer_that_is_right_is_not_written_out(learned, monkeypatch):
    monkeypatch.setattr(evaluate, "answer", None)
    found, _ = examined(learned, [talk(*pair) for pair in LEARNED.items()])
    assert found["exact_match"] == 1
    assert [sample["answered"] for sample in found["samples"]] == list(LEARNED.values())


def test_a_wrong_one_is_written_out_as_far_as_people_read(learned, monkeypatch):
    monkeypatch.setattr(evaluate, "NUM_SHOWN", 2)
    conversations = [talk("three", LATTE)] * 5
    found, _ = examined(learned, conversations)
    assert [sample["is_whole"] for sample in found["samples"]] == [True, True, False, False, False]
    assert (found["exact_match"], found["valid_json"]) == (0, 0)


def test_a_reading_foresees_the_last_answer_up_to_the_first_other_token(learned):
    _, tokenizer = learned
    (example,) = examples_of(tokenizer, [[*talk("one", "no"), *talk("two", LATTE)]])
    right = example.ids[1:][example.trained[1:]]
    stop = tokenizer.eos_token_id

    def said(likeliest):
        return foreseen(tokenizer, example, Reading(np.zeros(len(right)), likeliest), (stop,))

    assert said(right) == Said(LATTE, True)
    # What it would have said instead of the first answer is no matter.
    other = right.copy()
    other[0] = stop
    assert said(other) == Said(LATTE, True)
    early = right.copy()
    early[-2] = stop
    assert said(early) == Said(tokenizer.decode(right[:-2]).rpartition("<|im_end|>")[2], True)
    late = right.copy()
    late[-1] = right[-2]
    assert said(late).text.startswith(LATTE) and not said(late).is_whole


@pytest.mark.parametrize(
    ("beginning", "undecided"),
    [("", True), (" \n", True), ("no", True), ("no JSON", True), ("yes", False), ("{", True), (" [", True),
     ("n\ufffd", True), ("x\ufffd", False)],
)  # fmt: skip
def test_an_answer_is_decided_when_it_can_neither_be_right_nor_json(beginning, undecided):
    assert is_undecided(beginning, "no JSON") is undecided
