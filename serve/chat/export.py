"""A conversation for people (Markdown) and for a training (one line of a data file). Pure. Both end with a line end."""

import json
import re

from serve.chat.conversation import Conversation
from serve.chat.phrases import say
from serve.errors import UserError

# One is held out to measure with, so that of one conversation nothing is learned.
LEAST_TO_TRAIN = 2
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


def to_markdown(conversation: Conversation) -> str:
    """What stands, a heading for who spoke, each text as it was said; also what is no longer sent to the model."""
    parts = [("System", conversation.system)] if conversation.system else []
    for exchange in conversation.exchanges:
        parts.append(("User", exchange.question))
        if answer := exchange.answer:
            parts.append((answer.adapter or "Answer", answer.text))
            if answer.is_interrupted:
                parts[-1] = (f"{parts[-1][0]} (interrupted)", answer.text)
            parts += [(f"{name} (not kept)", text) for name, text in exchange.others.items()]
    return _encodable("\n".join(f"## {who}\n\n{_closed(text)}\n" for who, text in parts))


def to_messages_line(conversation: Conversation) -> str:
    """The conversation as `{"messages": [...]}`, a line that `make train DATA=file.jsonl` reads.

    A training learns every answer. So an exchange is left out, with its question, if its answer was interrupted: it would
    teach to stop in the middle; or if either is blank: no training takes it. So are an open question, the answers that a
    comparison did not keep, and a summary. What follows a left-out exchange stays: read the line if it leans on what is gone.
    Raises `UserError` if nothing is left.
    """
    messages = [{"role": "system", "content": conversation.system}] if conversation.system.strip() else []
    num_left = 0
    for exchange in conversation.exchanges:
        answer = exchange.answer
        if answer and not answer.is_interrupted and answer.text.strip() and exchange.question.strip():
            messages.append({"role": "user", "content": exchange.question})
            messages.append({"role": "assistant", "content": answer.text})
            num_left += 1
    if not num_left:
        raise UserError(say("nothing_to_learn"))
    return _encodable(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def code_blocks(text: str) -> list[str]:
    """The blocks of code in an answer, without their fences; one that was cut off goes to the end."""
    return _read_fences(text)[0]


def _closed(text: str) -> str:
    """The text; a block of code that its end has cut is closed, or it would swallow the headings that follow."""
    fence = _read_fences(text)[1]
    return f"{text}\n{fence}" if fence else text


def _read_fences(text: str) -> tuple[list[str], str]:
    """(the blocks of code, the fence that is still open at the end or "")."""
    blocks: list[list[str]] = []
    fence = ""
    for line in text.split("\n"):
        marks, rest = match.groups() if (match := FENCE.fullmatch(line)) else ("", "")
        # Backticks after backticks are code in a line of text.
        if marks and not fence and not (marks[0] == "`" and "`" in rest):
            fence = marks
            blocks.append([])
        elif fence and marks.startswith(fence) and not rest.strip():
            fence = ""
        elif fence:
            blocks[-1].append(line)
    return ["\n".join(lines) for lines in blocks], fence


def _encodable(text: str) -> str:
    """Half a surrogate pair can be typed, but no file of text can hold it."""
    return text.encode("utf-8", "replace").decode()
