"""The shapes that records come in, each recognised by its keys: a record's value -> a conversation."""

import json
import reprlib
from collections.abc import Collection
from typing import Any

from launcher.chat import ROLES, TEXT, Message

MESSAGES, SHAREGPT, ALPACA, PROMPT_COMPLETION = "messages", "sharegpt", "alpaca", "prompt-completion"
# By what a shape is known, the surest first: real files carry keys of several shapes.
KNOWN_BY = {
    "messages": MESSAGES,
    "conversations": SHAREGPT,
    "instruction": ALPACA,
    "prompt": PROMPT_COMPLETION,
    "text": TEXT,
    "output": ALPACA,
    "completion": PROMPT_COMPLETION,
}
KEYS = {*KNOWN_BY, "input", "system", "history", "response"}
FORMS = "messages, conversations, instruction and output, prompt and completion, or text (README, Your own data)"
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bing", "chatgpt", "bard"), "assistant"),
    "system": "system",
}
TYPES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}


class ShapeError(Exception):
    """What is wrong with a record, ending with what to try."""


def conversation(value: Any) -> tuple[str, list[Message]]:
    """The name of the record's shape, and its conversation; plain text is one message with the role `TEXT`."""
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise ShapeError(f"{_kind(value)}, not an object; write an object with {FORMS}")
    # Tables write a key that a record does not have as null.
    present = {key: part for key, part in value.items() if part is not None}
    shape = _shape(present) or _shape(value)
    if not shape:
        raise ShapeError(unknown_keys(value))
    if shape == TEXT:
        return shape, [_message(TEXT, value["text"], '"text"')]
    messages = READERS[shape](value)
    # A table's empty cell is no system turn.
    if system := present.get("system"):
        messages.insert(0, _message("system", system, '"system"'))
    _check_turns(messages)
    return shape, messages


def unknown_keys(keys: Collection[Any]) -> str | None:
    """What is wrong if no shape has any of these keys, None if one has."""
    if _shape(keys):
        return None
    found = ", ".join(reprlib.repr(key) for key in list(keys)[:8]) + (", …" if len(keys) > 8 else "")
    return f"no known shape (keys: {found or 'none'}); name them {FORMS}"


def _shape(keys: Collection[Any]) -> str | None:
    return next((shape for key, shape in KNOWN_BY.items() if key in keys), None)


def _read_messages(record: dict[str, Any]) -> list[Message]:
    return _turns(_listed(record, "messages"))


def _read_sharegpt(record: dict[str, Any]) -> list[Message]:
    return _turns(_listed(record, "conversations"), "from", "value", SHAREGPT_ROLES)


def _read_alpaca(record: dict[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for number, pair in enumerate(record.get("history") or [], start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ShapeError(f'"history" {number} is not a pair; write ["question", "answer"]')
        messages.append(_message("user", pair[0], f'the question of "history" {number}'))
        messages.append(_message("assistant", pair[1], f'the answer of "history" {number}'))
    asked = _message("user", _given(record, "instruction"), '"instruction"')
    if (more := record.get("input")) not in (None, ""):
        asked["content"] += "\n\n" + _text(more, '"input"')
    return [*messages, asked, _message("assistant", _given(record, "output"), '"output"')]


def _read_prompt_completion(record: dict[str, Any]) -> list[Message]:
    answer = "response" if record.get("completion") is None and "response" in record else "completion"
    messages: list[Message] = []
    for key, role in (("prompt", "user"), (answer, "assistant")):
        part = _given(record, key)
        messages += _turns(part) if isinstance(part, list) else [_message(role, part, f'"{key}"')]
    return messages


READERS = {
    MESSAGES: _read_messages,
    SHAREGPT: _read_sharegpt,
    ALPACA: _read_alpaca,
    PROMPT_COMPLETION: _read_prompt_completion,
}


def _given(record: dict[str, Any], key: str) -> Any:
    if key not in record:
        raise ShapeError(f'no "{key}" (keys: {", ".join(map(reprlib.repr, list(record)[:8]))}); add it')
    return record[key]


def _listed(record: dict[str, Any], key: str) -> list[Any]:
    """The list of turns under `key`; a table's cell may hold it as JSON."""
    turns = _given(record, key)
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise ShapeError(f'"{key}" is text that is not JSON; write it with json.dumps') from None
    if not isinstance(turns, list):
        raise ShapeError(f'"{key}" is {_kind(turns)}, not a list; write a list of turns')
    return turns


def _turns(
    turns: list[Any], role_key: str = "role", text_key: str = "content", roles: dict[str, str] | None = None
) -> list[Message]:
    """Each turn as a message; `roles` says which role a foreign name stands for."""
    roles = roles or {role: role for role in ROLES}
    messages = []
    for number, turn in enumerate(turns, start=1):
        name = f"message {number}"
        if not isinstance(turn, dict):
            raise ShapeError(f'{name} is {_kind(turn)}, not an object; write {{"{role_key}": …, "{text_key}": …}}')
        role = turn.get(role_key)
        if role_key not in turn:
            raise ShapeError(f'{name} has no "{role_key}"; add one of: {", ".join(roles)}')
        if not isinstance(role, str) or role not in roles:
            raise ShapeError(f"{name}: unknown role {reprlib.repr(role)}; choose from: {', '.join(roles)}")
        if text_key not in turn:
            raise ShapeError(f'{name} has no "{text_key}"; add it, or remove the message')
        messages.append(_message(roles[role], turn[text_key], f'{name}: "{text_key}"'))
    return messages


def _message(role: str, text: Any, name: str) -> Message:
    return {"role": role, "content": _text(text, name)}


def _text(value: Any, name: str) -> str:
    """`value` if it is text that can be learned; `name` is what a fault calls it."""
    if value is None:
        raise ShapeError(f"{name} is null; write some text, or remove it")
    if not isinstance(value, str):
        raise ShapeError(f"{name} is {_kind(value)}, not text; write it as a string")
    if not value.strip():
        raise ShapeError(f"{name} is empty; write some text, or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise ShapeError(f"{name} holds {half}, half of a character; write both halves, or remove it") from None
    return value


def _check_turns(messages: list[Message]) -> None:
    """A system turn at most and first; then user and assistant in turn, the assistant last."""
    if not messages:
        raise ShapeError("no messages; write a user's turn and the assistant's answer")
    speaker = ""
    for number, message in enumerate(messages, start=1):
        before, speaker = speaker, message["role"]
        if before == speaker:
            raise ShapeError(f"message {number}: two {speaker} turns in a row; join them")
        if before and speaker == "system":
            raise ShapeError(f"message {number}: a system turn must come first; move it to the top")
        if before in ("", "system") and speaker == "assistant":
            raise ShapeError(f"message {number}: the assistant speaks first; begin with a user turn, or remove it")
    if speaker != "assistant":
        raise ShapeError(f"the last turn is the {speaker}'s, so there is nothing to learn; end with an assistant turn")


def _kind(value: Any) -> str:
    return "null" if value is None else TYPES.get(type(value), type(value).__name__)
