"""Tokenising: what is too long, what would teach nothing, and the cache."""

import re

import numpy as np
import pytest

from launcher import encoding
from launcher.chat import TEXT
from launcher.config import Data
from launcher.data import Splits
from launcher.encoding import count_trained, encode, encode_splits, join
from launcher.errors import UserError

SHORT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
LONG_QUESTION = [{"role": "user", "content": "latte " * 100}, {"role": "assistant", "content": "ok"}]
LONG_ANSWER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "latte " * 100}]
LIMIT = 50


def encoded(tokenizer, *conversations, **options):
    places = [f"orders.jsonl:{number}" for number in range(1, len(conversations) + 1)]
    return encode(tokenizer, conversations, places, Data(**options), LIMIT)


def test_an_example_that_is_too_long_is_an_error_with_both_numbers(tokenizer):
    with pytest.raises(UserError, match=r"1 of 2 examples are longer than 50 tokens.*orders.jsonl:2, has \d+"):
        encoded(tokenizer, SHORT, LONG_ANSWER)


def test_it_is_cut_or_dropped_when_asked_for_and_counted(tokenizer):
    cut = encoded(tokenizer, SHORT, LONG_ANSWER, overflow="truncate")
    assert (len(cut), cut.num_long, len(cut[1].ids)) == (2, 1, LIMIT)
    dropped = encoded(tokenizer, SHORT, LONG_ANSWER, overflow="drop")
    assert (len(dropped), dropped.num_long) == (1, 1)


def test_what_has_no_trained_token_left_is_a_fault_or_skipped(tokenizer):
    with pytest.raises(UserError, match=r"^orders.jsonl:2: no trained token in its first 50; try data.max_length=\d+$"):
        encoded(tokenizer, SHORT, LONG_QUESTION, overflow="truncate")
    skipped = encoded(tokenizer, SHORT, LONG_QUESTION, overflow="truncate", on_error="skip")
    assert (len(skipped), skipped.num_empty) == (1, 1)


@pytest.mark.parametrize(
    ("train", "held_out", "says"),
    [
        (
            [LONG_QUESTION],
            [SHORT],
            "no example is left to learn from, of 1; try a larger data.max_length, or other data",
        ),
        ([SHORT, SHORT], [LONG_QUESTION], "to measure with, of 1 held out (2 are left to learn from); try a larger"),
    ],
)
def test_of_both_splits_something_must_be_left(tokenizer, tiny_llama, tmp_path, monkeypatch, train, held_out, says):
    monkeypatch.setenv("AFINAR_CACHE", str(tmp_path))
    splits = Splits(train, held_out, tuple("ab"[: len(train)]), tuple("c" * len(held_out)))
    for _ in range(2):  # nothing of it is cached
        with pytest.raises(UserError, match=re.escape(says)):
            encode_splits(tokenizer, tiny_llama, splits, Data(overflow="drop"), LIMIT)


def test_plain_text_is_trained_whole_and_may_be_split(tokenizer):
    text = [{"role": TEXT, "content": "latte " * 100}]
    whole = encode(tokenizer, [text], ["a.txt"], Data(), 1000)
    assert whole[0].trained.all()
    assert whole[0].ids[-1] == tokenizer.eos_token_id
    parts = encode(tokenizer, [text], ["a.txt"], Data(overflow="split"), LIMIT)
    # Every token but the first is predicted once.
    assert np.array_equal(np.concatenate([part.ids[1:] for part in parts]), whole[0].ids[1:])
    assert count_trained(parts) == count_trained(whole)
    assert max(len(part.ids) for part in parts) == LIMIT
    with pytest.raises(UserError, match="split is for plain text"):
        encoded(tokenizer, LONG_ANSWER, overflow="split")


def test_examples_behave_like_the_list_they_were(tokenizer):
    examples = encoded(tokenizer, SHORT, SHORT, SHORT)
    assert len(examples) == len(examples[:2]) + 1 == 3
    assert np.array_equal(examples[-1].ids, examples[0].ids)
    assert count_trained(examples) == count_trained(list(examples)) == 3 * count_trained([examples[1]])
    assert len(join([])) == 0
    with pytest.raises(IndexError):
        examples[3]


def test_tokenising_happens_once_and_again_when_anything_changes(tokenizer, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("AFINAR_CACHE", str(tmp_path))
    calls = []
    real = encoding.encode
    monkeypatch.setattr(encoding, "encode", lambda *args: calls.append(1) or real(*args))

    def run(train=SHORT, longest=LIMIT, **options):
        splits = Splits([train], [SHORT], ("a:1",), ("a:2",))
        return encode_splits(tokenizer, tiny_llama, splits, Data(**options), longest)

    first, second = run(), run()
    assert len(calls) == 2  # one for each split
    assert np.array_equal(first[0].ids, second[0].ids)
    run(longest=LIMIT + 1)
    run(overflow="drop")
    run(train=[*SHORT, *SHORT])
    tokenizer.chat_template = "Orders:" + tokenizer.chat_template
    run()
    assert len(calls) == 10
