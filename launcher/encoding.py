"""Conversations -> tokenised examples, once a machine: the result is cached by everything it depends on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from rich.console import Console
from rich.progress import track
from safetensors import numpy as tensors

from launcher.chat import TEXT, Message, Rendered, Tokenizer, render
from launcher.config import Data
from launcher.data import Splits, raise_faults
from launcher.errors import UserError
from launcher.rundir import write_atomically
from launcher.weights import cache_dir, one_at_a_time

FORMAT = 1
MAX_CACHED = 20
# Fewer than this are tokenised before a progress bar could be read.
MANY = 5000
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model")


@dataclass(frozen=True)
class Example:
    """A tokenised conversation: `ids` int32 [L], and `trained` bool [L], whether token i is predicted for the loss."""

    ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Many examples end to end: `ids` int32 [T], `trained` bool [T]; example i ends before `ends[i]`, int64 [N].

    `num_long` conversations were longer than allowed and treated as `data.overflow` says; `num_empty` were left out
    because nothing of them is trained.
    """

    ids: np.ndarray
    trained: np.ndarray
    ends: np.ndarray
    num_long: int = 0
    num_empty: int = 0

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def starts(self) -> np.ndarray:
        """Where each example begins, int64 [N]."""
        return self.ends - self.lengths

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [N]."""
        return np.diff(self.ends, prepend=0)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        span = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return Example(self.ids[span], self.trained[span])


def join(examples: Sequence[Example], num_long: int = 0, num_empty: int = 0) -> Examples:
    """Lay examples end to end."""
    return Examples(
        np.concatenate([np.zeros(0, np.int32), *(e.ids for e in examples)]),
        np.concatenate([np.zeros(0, bool), *(e.trained for e in examples)]),
        np.cumsum([len(e.ids) for e in examples], dtype=np.int64),
        num_long,
        num_empty,
    )


def count_trained(batch: Sequence[Example]) -> int:
    """Tokens that carry loss. The first token of a sequence is never predicted."""
    if isinstance(batch, Examples):
        return int(batch.trained.sum() - batch.trained[batch.starts].sum())
    return sum(int(np.count_nonzero(example.trained[1:])) for example in batch)


def encode(
    tokenizer: Tokenizer, conversations: Sequence[list[Message]], places: Sequence[str], data: Data, longest: int
) -> Examples:
    """Tokenise `conversations`, which come from `places` (`file:line`), to at most `longest` tokens each.

    Raises `UserError` for longer ones where `data.overflow` is `error`, and for those without a trained token unless
    `data.on_error` skips them.
    """
    examples: list[Example] = []
    lengths: list[int] = []
    empty: list[str] = []
    bar = Console(stderr=True, quiet=len(conversations) < MANY)
    pairs = list(zip(conversations, places, strict=True))
    for messages, place in track(pairs, "tokenising", console=bar, transient=True):
        rendered = render(tokenizer, messages)
        lengths.append(len(rendered.ids))
        pieces = _fit(rendered, longest, data.overflow, is_text=messages[0]["role"] == TEXT)
        kept = [piece for piece in pieces if piece.trained[1:].any()]
        if pieces and not kept:
            empty.append(f"{place}: no trained token in its first {longest}; try data.max_length={lengths[-1]}")
        examples += kept
    num_long = sum(length > longest for length in lengths)
    if num_long and data.overflow == "error":
        _refuse_long(num_long, lengths, places, longest)
    if empty and data.on_error == "stop":
        raise_faults(empty)
    return join(examples, num_long, len(empty))


def _fit(rendered: Rendered, longest: int, overflow: str, *, is_text: bool) -> list[Example]:
    """The examples that a conversation becomes: itself, its beginning, nothing, or for plain text its parts."""
    ids, trained = np.array(rendered.ids, np.int32), np.array(rendered.trained, bool)
    if len(ids) <= longest or overflow == "error":
        return [Example(ids, trained)]
    if overflow == "drop":
        return []
    if overflow == "split":
        if not is_text:
            raise UserError("data.overflow=split is for plain text, not for conversations; try truncate or drop")
        # A part begins with the last token of the one before, so that every token is predicted once.
        starts = range(0, len(ids) - 1, longest - 1)
        return [Example(ids[start : start + longest], trained[start : start + longest]) for start in starts]
    return [Example(ids[:longest], trained[:longest])]


def _refuse_long(num_long: int, lengths: list[int], places: Sequence[str], longest: int) -> None:
    most = max(lengths)
    raise UserError(
        f"{num_long} of {len(lengths)} examples are longer than {longest} tokens, the smaller of data.max_length and what "
        f"the model can read (the longest, {places[lengths.index(most)]}, has {most}); "
        f"try data.max_length={most}, or data.overflow=truncate or drop"
    )


def encode_splits(tokenizer: Any, folder: Path, splits: Splits, data: Data, longest: int) -> tuple[Examples, Examples]:
    """(train, held out), tokenised or read from the cache; `folder` holds the files of `tokenizer`.

    Processes that start together tokenise once: the others wait for the first one here, before any process group with a
    time-out exists.
    """
    depends_on = [
        FORMAT, splits.fingerprint, _digest(folder), tokenizer.chat_template, longest, data.overflow, data.on_error
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:24]
    file = cache_dir() / "examples" / f"{key}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(file):
        if not file.is_file():
            train = encode(tokenizer, splits.train, splits.train_places, data, longest)
            held_out = encode(tokenizer, splits.held_out, splits.held_out_places, data, longest)
            _require_some(train, held_out, splits)
            write_atomically(file, tensors.save({**_pack("train", train), **_pack("held_out", held_out)}))
            _forget_old(file.parent)
    saved = tensors.load_file(file)
    return _unpack("train", saved), _unpack("held_out", saved)


def _require_some(train: Examples, held_out: Examples, splits: Splits) -> None:
    """Raise `UserError` unless something is left of both splits."""
    if not train:
        raise UserError(
            f"no example is left to learn from, of {len(splits.train)}; try a larger data.max_length, or other data"
        )
    if not held_out:
        raise UserError(
            f"no example is left to measure with, of {len(splits.held_out)} held out ({len(train)} are left to learn "
            "from); try a larger data.max_length or data.held_out, or other data"
        )


def _pack(name: str, examples: Examples) -> dict[str, np.ndarray]:
    counts = np.array([examples.num_long, examples.num_empty])
    return {
        f"{name}/ids": examples.ids, f"{name}/trained": examples.trained, f"{name}/ends": examples.ends,
        f"{name}/counts": counts,
    }  # fmt: skip


def _unpack(name: str, saved: dict[str, np.ndarray]) -> Examples:
    num_long, num_empty = saved[f"{name}/counts"].tolist()
    return Examples(saved[f"{name}/ids"], saved[f"{name}/trained"], saved[f"{name}/ends"], num_long, num_empty)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _forget_old(folder: Path) -> None:
    """Keep the newest files of the cache."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    for old in files[MAX_CACHED:]:
        old.unlink(missing_ok=True)
        old.with_name(old.name + ".lock").unlink(missing_ok=True)
