"""What a line at the prompt means. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from serve.chat.phrases import hint, say

KEYS = ("Ctrl-C", "Alt-Enter", "Ctrl-X Ctrl-E", "Up, Ctrl-R")
# On a terminal that edits the line itself.
PLAIN_KEYS = KEYS[:1]
# What may stand behind a command: nothing, something, or something that must be there, with an example.
NOTHING = ""
COMMANDS: dict[str, str] = {
    "/help": NOTHING,
    "/quit": NOTHING,
    "/reset": NOTHING,
    "/system": "[text]",
    "/set": "name=value ...",
    "/params": NOTHING,
    "/regenerate": NOTHING,
    "/undo": NOTHING,
    "/edit": "[question]",
    "/adapter": "[name]",
    "/adapters": NOTHING,
    "/compare": "[name name ...]",
    "/stats": NOTHING,
    "/save": "name",
    "/load": "name",
    "/resume": "[name]",
    "/export": "file",
    "/copy": "[code]",
    "/file": "path",
    "/status": NOTHING,
}
EXAMPLES = {
    "/set": "/set temperature=0.7",
    "/save": "/save my-talk",
    "/load": "/load my-talk",
    "/export": "/export talk.md",
    "/file": "/file notes.txt",
}
# These do not wait for the answer that is under way.
AT_ONCE = ("/help", "/quit")


@dataclass(frozen=True)
class Line:
    """A line is a known `command` with the `rest` behind it, or a `problem` to show, or else `prompt` for the model."""

    command: str = ""
    rest: str = ""
    prompt: str = ""
    problem: str = ""


def parse(text: str) -> Line:
    """Only a word like `/word` at the very start is a command: paths, and text after a space, go to the model."""
    word = text.split(maxsplit=1)[0] if text.strip() else ""
    if not re.fullmatch(r"/[A-Za-z]*", word) or not text.startswith("/"):
        return Line(prompt=text)
    if word not in COMMANDS:
        return Line(problem=say("unknown", word=word, hint=hint(word, COMMANDS)))
    rest, takes = text[len(word) :].strip(), COMMANDS[word]
    if rest and takes == NOTHING:
        return Line(problem=say("takes_nothing", name=word))
    if not rest and takes and not takes.startswith("["):
        return Line(problem=say("needs", name=word, what=takes, example=EXAMPLES[word]))
    return Line(command=word, rest=rest)


def help_text(keys: Iterable[str]) -> list[str]:
    """The commands and these keys, one a line."""
    usages = {f"{name} {takes}".rstrip(): say(name) for name, takes in COMMANDS.items()}
    usages |= {key: say(key) for key in keys}
    column = max(map(len, usages)) + 2
    return [f"  {usage:<{column}}{meaning}" for usage, meaning in usages.items()]
