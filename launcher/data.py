"""Conversations: read, check, split."""

import functools
import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from launcher import cafe, shapes
from launcher.chat import Message
from launcher.config import Data
from launcher.errors import UserError
from launcher.sources import Fault, Record, records
from launcher.variables import EMBEDDED_TASK

MAX_HELD_OUT = 200
# What a chat template may write around a turn, or in front of the first.
TEMPLATE_BYTES = 80
MAX_FAULTS_SHOWN = 20
SPLITS: tuple[cafe.Split, ...] = ("train", "held_out")
NO_EXAMPLES = f"no examples in it; write records with {shapes.FORMS}"

Example = tuple[list[Message], str]


@dataclass(frozen=True)
class Splits:
    """Conversations to train on and conversations to measure with.

    `train_places` and `held_out_places` say where each comes from (`file:line`), `shapes` how many came in which shape, and
    `left_out` which faulty records were skipped, a line each.
    """

    train: list[list[Message]]
    held_out: list[list[Message]]
    train_places: tuple[str, ...] = ()
    held_out_places: tuple[str, ...] = ()
    shapes: dict[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of both splits: equal if and only if the same is learned and measured."""
        return hashlib.sha256(json.dumps([self.train, self.held_out]).encode()).hexdigest()

    @functools.cached_property
    def system(self) -> str | None:
        """The system turn that all training examples begin with; None if they have none, or several."""
        first = [messages[0] for messages in self.train]
        texts = {turn["content"] if turn["role"] == "system" else None for turn in first}
        return texts.pop() if len(texts) == 1 else None

    @functools.cached_property
    def longest_tokens(self) -> int:
        """No example has more tokens, whatever the tokenizer: a token is a byte at least, a template adds to each turn."""
        sizes = (sum(len(m["content"].encode()) + TEMPLATE_BYTES for m in messages) for messages in self.train)
        return max(sizes, default=0) + TEMPLATE_BYTES

    def require(self, fingerprint: str, source: str) -> None:
        """Raise `UserError` if these are not the splits that a run was begun with."""
        if self.fingerprint != fingerprint:
            raise UserError(
                f"data.source={source} has changed since this run began; put it back, or train another: RUN="
            )


def read(data: Data) -> Splits:
    """The conversations of `data.source`, split; raises `UserError` with `file:line: what is wrong` for every fault."""
    found: Counter[str] = Counter()
    left_out: list[str] = []
    if data.source == EMBEDDED_TASK:
        train, held_out = ([(e["messages"], f"cafe:{n}") for n, e in enumerate(cafe.examples(s), 1)] for s in SPLITS)
        found[shapes.MESSAGES] = len(train) + len(held_out)
    else:
        examples, found, left_out = _read_source(data)
        random.Random("split").shuffle(examples)
        num_held_out = min(MAX_HELD_OUT, max(1, round(len(examples) * data.held_out)))
        held_out, train = examples[:num_held_out], examples[num_held_out:]
        if not train:
            few = f"{len(examples)} example(s) leave none to train on; add more" if examples else NO_EXAMPLES
            raise_faults([f"{data.source}: {few}", *left_out])
    train = train[: data.limit]
    return Splits(
        [messages for messages, _ in train],
        [messages for messages, _ in held_out],
        tuple(place for _, place in train),
        tuple(place for _, place in held_out),
        dict(found),
        tuple(left_out),
    )


def raise_faults(faults: Sequence[str], count: int | None = None) -> NoReturn:
    """Raise a `UserError` with as many of `faults` as a screen holds; `count` of them there are in all."""
    shown = list(faults[:MAX_FAULTS_SHOWN])
    if more := (count or len(faults)) - len(shown):
        shown.append(f"… and {more} more fault{'s' * (more > 1)}; mend them, or leave them out: data.on_error=skip")
    raise UserError(*shown)


def _read_source(data: Data) -> tuple[list[Example], Counter[str], list[str]]:
    """All that can be learned, how much of each shape, and the faults that are left out."""
    examples: list[Example] = []
    found: Counter[str] = Counter()
    faults: list[str] = []
    num_faults = 0
    for item in records(data):
        read = _understand(item)
        if not isinstance(read, Fault):
            shape, messages = read
            examples.append((messages, item.where))
            found[shape] += 1
            continue
        if read.fatal and data.on_error == "skip":
            raise UserError(str(read))
        num_faults += 1
        # A file that is no data at all has millions.
        if data.on_error == "skip" or num_faults <= MAX_FAULTS_SHOWN:
            faults.append(str(read))
    if faults and data.on_error == "stop":
        raise_faults(faults, num_faults)
    return examples, found, faults


def _understand(item: Record | Fault) -> tuple[str, list[Message]] | Fault:
    if isinstance(item, Fault):
        return item
    try:
        return shapes.conversation(item.value)
    except shapes.ShapeError as error:
        return Fault(item.where, str(error))
