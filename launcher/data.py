"""Conversations: read, check, split."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import cafe
from launcher.chat import ROLES, Message
from launcher.config import Data
from launcher.errors import UserError
from launcher.variables import EMBEDDED_TASK

MAX_HELD_OUT = 200
MAX_FAULTS_SHOWN = 20


@dataclass(frozen=True)
class Splits:
    """Conversations to train on and conversations to measure with."""

    train: list[list[Message]]
    held_out: list[list[Message]]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of both splits: equal if and only if the same is learned and measured."""
        return hashlib.sha256(json.dumps([self.train, self.held_out]).encode()).hexdigest()

    def require(self, fingerprint: str, source: str) -> None:
        """Raise `UserError` if these are not the splits that a run was begun with."""
        if self.fingerprint != fingerprint:
            raise UserError(
                f"data.source={source} has changed since this run began; put it back, or train another: RUN="
            )


def read(data: Data) -> Splits:
    """The conversations of `data.source`, split; raises `UserError` with `file:line: what is wrong` for every fault."""
    if data.source == EMBEDDED_TASK:
        train = [e["messages"] for e in cafe.examples("train")]
        held_out = [e["messages"] for e in cafe.examples("held_out")]
    else:
        conversations = _read_jsonl(Path(data.source))
        random.Random("split").shuffle(conversations)
        num_held_out = min(MAX_HELD_OUT, max(1, round(len(conversations) * data.held_out)))
        held_out, train = conversations[:num_held_out], conversations[num_held_out:]
        if not train:
            raise UserError(f"{data.source}: {len(conversations)} example(s) leave none to train on; add more lines")
    return Splits(train[: data.limit], held_out)


def _read_jsonl(path: Path) -> list[list[Message]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; try DATA=cafe")
    conversations: list[list[Message]] = []
    faults: list[str] = []
    with path.open(encoding="utf-8-sig", errors="strict") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if fault := _check_line(line, conversations):
                    faults.append(f"{path}:{number}: {fault}")
        except UnicodeDecodeError:
            faults.append(f"{path}: not UTF-8 text; save it as UTF-8")
    if faults:
        more = len(faults) - MAX_FAULTS_SHOWN
        raise UserError(*faults[:MAX_FAULTS_SHOWN], *([f"… and {more} more faults in {path}"] if more > 0 else []))
    if not conversations:
        raise UserError(f"{path}: no examples in it; write one {{'messages': [...]}} object a line")
    return conversations


def _check_line(line: str, conversations: list[list[Message]]) -> str | None:
    """Append the line's conversation, or say what is wrong with it."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error}); write one object a line"
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        return 'no "messages" list; write {"messages": [{"role": "user", "content": …}, …]}'
    for position, message in enumerate(messages):
        if fault := _check_message(message, messages[position - 1] if position else None):
            return f"message {position + 1}: {fault}"
    if messages[-1]["role"] != "assistant":
        return "the last message must be the assistant's, it is what is learned"
    conversations.append([{"role": m["role"], "content": m["content"]} for m in messages])
    return None


def _check_message(message: Any, before: Any) -> str | None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        return f"unknown role {role!r}; choose from: {', '.join(ROLES)}"
    if not isinstance(message.get("content"), str) or not message["content"].strip():
        return "empty content; write some text or remove the message"
    if before and before["role"] == message["role"]:
        return f"two {message['role']} turns in a row; join them"
    if before and message["role"] == "system":
        return "a system turn must come first; move it to the top"
    if not before and message["role"] == "assistant":
        return "the assistant speaks first; begin with a user turn"
    return None
