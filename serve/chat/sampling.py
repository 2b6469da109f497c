"""How answers are sampled, as it is typed: `temperature=0.7`, `stop=END`."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from serve import submission
from serve.chat.phrases import hint, say
from serve.engine import Sampling
from serve.errors import UserError
from serve.protocol import NO_REQUEST, ProtocolError

SAMPLED = tuple(field.name for field in dataclasses.fields(Sampling))
NAMES = (*SAMPLED, "max_tokens", "stop", "deadline_ms")


def words(text: str) -> list[str]:
    """The words of a line; quotes hold one with blanks together: `stop="a b"`. A backslash is one. Raises `UserError`."""
    parts = shlex.shlex(text, posix=True)
    parts.whitespace_split, parts.escape, parts.commenters = True, "", ""
    try:
        return list(parts)
    except ValueError:
        raise UserError(say("open_quote")) from None


def shown(params: Mapping[str, Any]) -> str:
    """The parameters as they are typed."""
    pairs = [(name, one) for name, value in params.items() for one in (value if name == "stop" else [value])]
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in pairs)


def change(params: Mapping[str, Any], word: str) -> dict[str, Any]:
    """The parameters with `name=value` changed; an empty value takes it back, `stop` is added to those there.

    Raises `UserError` for what a daemon would refuse.
    """
    name, equals, text = word.partition("=")
    if name not in NAMES or not equals:
        raise UserError(say("not_a_pair", word=word, hint=hint(name, NAMES)))
    changed = {key: value for key, value in params.items() if key != name or (name == "stop" and text)}
    if text:
        changed[name] = [*changed.get("stop", []), text] if name == "stop" else _number(text)
    try:
        submission.parse({"messages": [{"role": "user", "content": ""}], **changed}, NO_REQUEST)
    except ProtocolError as fault:
        raise UserError(say("bad_value", word=word, fault=fault, name=name)) from None
    return changed


def options_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as fields of a `Submission`."""
    sampled = {name: value for name, value in params.items() if name in SAMPLED}
    rest = {name: value for name, value in params.items() if name not in SAMPLED}
    return {"sampling": Sampling(**sampled), **rest}


def _number(text: str) -> Any:
    """A number where it is one; anything else goes on as text, and is refused with the rule it breaks."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text
