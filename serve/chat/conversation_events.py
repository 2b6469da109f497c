"""What can happen in a conversation, and the line that each event is in a file. Pure.

Which event may follow which, and what it does, is `serve.chat.conversation`'s.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Begin:
    """A client begins, or goes on with what it found in a file. `time`: seconds since 1970."""

    run: str
    model: str
    adapter: str
    time: float


@dataclass(frozen=True)
class System:
    """The text of the system turn from now on; "" for none."""

    text: str


@dataclass(frozen=True)
class User:
    """A new question, open until `Answer` or `Withdraw`."""

    text: str


@dataclass(frozen=True)
class Answer:
    """The answer, whole or as far as it came; `adapter` is who gave it, `usage` the daemon's counts of tokens."""

    text: str
    is_interrupted: bool = False
    adapter: str = ""
    usage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Withdraw:
    """The open question got not a word. If it had been asked before (`Edit`, `Regenerate`), that exchange comes back."""


@dataclass(frozen=True)
class Undo:
    """The last exchange is taken back."""


@dataclass(frozen=True)
class Edit:
    """The last question becomes this one and is open; an answer it had is taken back."""

    text: str


@dataclass(frozen=True)
class Regenerate:
    """The last answer is taken back; its question is open again."""


@dataclass(frozen=True)
class Reset:
    """All exchanges are taken back, the system turn stays."""


@dataclass(frozen=True)
class Drop:
    """So many more of the oldest exchanges are no longer sent; never the system turn, never an open question."""

    num_exchanges: int


@dataclass(frozen=True)
class Summary:
    """A person's own words, sent in place of what was dropped; "" for none."""

    text: str


@dataclass(frozen=True)
class Adapter:
    """Who answers from now on."""

    name: str


@dataclass(frozen=True)
class Params:
    """How answers are sampled from now on: all the values that were chosen, not only the new ones."""

    values: dict[str, Any]


@dataclass(frozen=True)
class Others:
    """The answers of a comparison that were not kept, by adapter; the one before this event was."""

    answers: dict[str, str]


Event = (
    Begin | System | User | Answer | Withdraw | Undo | Edit | Regenerate | Reset | Drop | Summary | Adapter | Params | Others
)  # fmt: skip
KINDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in typing.get_args(Event)}


class NewerError(ValueError):
    """An event that this version does not know."""


def to_line(event: Event) -> bytes:
    """The event as a line of JSON, its kind first. Half a surrogate pair, which a terminal may paste, survives too."""
    record = {"kind": type(event).__name__.lower(), **dataclasses.asdict(event)}
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def from_line(line: bytes) -> Event:
    """The event of a line; raises `ValueError`, for what only a newer version knows `NewerError`."""
    try:
        record = json.loads(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        raise ValueError("not a line of JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("not an event")
    fields = {name: value for name, value in record.items() if name != "kind"}
    if not (kind := KINDS.get(record["kind"])):
        raise NewerError(f"unknown event {record['kind']!r}")
    hints = typing.get_type_hints(kind)
    for name, value in fields.items():
        if name not in hints:
            raise NewerError(f"{record['kind']} with an unknown {name!r}")
        if not _fits(value, hints[name]):
            raise ValueError(f"{record['kind']} with {name!r} of a wrong type")
    try:
        return typing.cast(Event, kind(**fields))
    except TypeError:
        raise ValueError(f"{record['kind']} without all it needs") from None


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is dict:
        member = typing.get_args(hint)[1]
        return isinstance(value, dict) and (member is Any or all(_fits(part, member) for part in value.values()))
    return type(value) is hint or (hint is float and type(value) is int)
