"""What a line at the prompt means. Pure."""

import re
from dataclasses import dataclass

from serve.errors import nearest

COMMANDS = {
    "/help": "show this",
    "/reset": "forget the conversation and begin again",
    "/status": "what is loaded, and how busy it is",
    "/quit": "leave (so does Ctrl-D)",
}
KEYS = {
    "Ctrl-C": "stop the answer, keep what came of it",
    "Alt-Enter": "a new line in the prompt",
    "Up, Ctrl-R": "earlier prompts, also those of other days",
}


@dataclass(frozen=True)
class Line:
    """A line is a known `command`, or a `problem` to show, or else `prompt` for the model."""

    command: str = ""
    prompt: str = ""
    problem: str = ""


def parse(text: str) -> Line:
    """Only a word like `/word` at the very start is a command: paths, and text after a space, go to the model."""
    word = text.split(maxsplit=1)[0] if text.strip() else ""
    if not re.fullmatch(r"/[A-Za-z]*", word) or not text.startswith("/"):
        return Line(prompt=text)
    if text.strip() in COMMANDS:
        return Line(command=text.strip())
    if word in COMMANDS:
        return Line(problem=f"{word} takes nothing after it; try {word}")
    return Line(problem=f"{word}: unknown command; {nearest(word, COMMANDS)} Try /help")


def help_text() -> str:
    """The commands and the keys, one a line."""
    return "\n".join(f"  {name:<12}{meaning}" for name, meaning in {**COMMANDS, **KEYS}.items())
