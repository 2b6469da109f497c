"""What cannot fit is known without tokenising it, and what may fit is never refused, whatever the tokenizer."""

import random
import sys
import unicodedata
from collections import defaultdict
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serve import held
from serve.engine import TooLongError
from serve.token_bytes import NFC_BYTES, TokenBytes, measure
from tests.conftest import tiny_tokenizer

LETTERS = "abcñé🦊漢 \n\t-=#\x00\x04\x05\u1fbe\u0308\u0301\u212b힣"


def wrapped(backend: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def composing() -> Any:
    """A byte-level tokenizer that composes first, as Qwen's does."""
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.NFC()])
    return wrapped(backend)


def falling_back() -> Any:
    """A tokenizer of the older Llamas' kind: spaces are shown, and what has no token is spelled in bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc", "ab", "▁▁", "abc"]
    merges = [("a", "b"), ("▁", "▁"), ("ab", "c")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.ByteFallback()
    return wrapped(backend)


def without_a_byte() -> Any:
    """A byte-level tokenizer that drops the letter b without a word."""
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c != "b"]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "aa"])}, [("a", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return wrapped(backend)


@pytest.mark.parametrize("make", [tiny_tokenizer, composing, falling_back, without_a_byte, "smollm2"])
def test_no_text_has_fewer_tokens_than_its_length_tells(make: Any, request: pytest.FixtureRequest) -> None:
    if make == "smollm2":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(request.getfixturevalue(make))
    else:
        tokenizer = make()
    measured = measure(tokenizer)
    assert measured.most > 0

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    draw = random.Random(0)
    vocabulary = tokenizer.get_vocab()
    texts = ["".join(draw.choices(LETTERS, k=300)) for _ in range(50)]
    texts += [tokenizer.decode([vocabulary[token]]) * 20 for token in sorted(vocabulary, key=len)[-50:]]
    texts += [letter * 300 for letter in LETTERS]
    assert [text for text in texts if measured.least_tokens(text) > count(text)] == []
    # It is of use: a text without end is known to be one.
    assert measured.least_tokens("a c" * 100_000) > 1000


def test_a_token_that_is_longest_is_counted_exactly() -> None:
    tokenizer = without_a_byte()
    assert measure(tokenizer).least_tokens("a" * 600) == len(tokenizer("a" * 600)["input_ids"]) == 300
    assert measure(tokenizer).least_tokens("b" * 600) == len(tokenizer("b" * 600)["input_ids"]) == 0


def test_of_a_tokenizer_that_may_drop_or_shorten_text_nothing_is_said() -> None:
    def changed(**parts: Any) -> Any:
        backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
        for name, part in parts.items():
            setattr(backend, name, part)
        return wrapped(backend)

    spaced = tiny_tokenizer()
    spaced.add_tokens([AddedToken("<mask>", lstrip=True)])
    removed = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    uncertain = [
        None,
        spaced,
        changed(pre_tokenizer=removed),
        changed(pre_tokenizer=pre_tokenizers.Whitespace()),
        changed(normalizer=normalizers.NFKC()),
        changed(normalizer=normalizers.Strip()),
        changed(normalizer=normalizers.Replace("abc", "a")),
        wrapped(Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))),
        wrapped(Tokenizer(models.BPE({"a": 0}, []))),
    ]
    assert [measure(tokenizer) for tokenizer in uncertain] == [TokenBytes()] * len(uncertain)
    assert TokenBytes().least_tokens("a" * 10**6) == 0


@pytest.mark.slow
def test_composing_shortens_no_more_than_it_is_thought_to() -> None:
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    spellings = defaultdict(int)
    for character in characters:
        whole = unicodedata.normalize("NFD", character)
        spellings[whole] = max(spellings[whole], len(character.encode()))

    def longest(whole: str) -> int:
        best = [0]
        for end in range(1, len(whole) + 1):
            best.append(max(best[start] + spellings.get(whole[start:end], -99) for start in range(end)))
        return best[-1]

    composed = [c for c in characters if unicodedata.normalize("NFC", c) == c]
    worst = max(longest(unicodedata.normalize("NFD", c)) / len(c.encode()) for c in composed)
    assert 3 < worst <= NFC_BYTES


def test_what_cannot_fit_is_refused_long_before_it_is_counted(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(smollm2)
    ours = held.Held(None, tokenizer, "smollm2", "merged", "fp32")
    text = [{"role": "user", "content": "palabra " * 2**19}]
    turns = [{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(9_999)]
    read, rendered = [], []
    tokenize, render = held.tokenize, tokenizer.apply_chat_template
    monkeypatch.setattr(held, "tokenize", lambda words, text: read.append(len(text)) or tokenize(words, text))
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda turns, **how: rendered.append(len(turns)) or render(turns, **how)
    )
    for messages in (text, turns):
        with pytest.raises(TooLongError):
            ours.prompt_ids(messages, 2048)
    # Of four million characters, and of turns that are rendered with all before them, fifty million in all.
    assert sum(read) < 50_000 and sum(rendered) < 500_000
    assert ours.prompt_ids(turns[:9], 2048) == ours.prompt_ids(turns[:9])
