"""The files of conversations, read: one found by the beginning of its name, a list of them newest first, the whole of one."""

import contextlib
import difflib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from serve.chat.conversation import Conversation, count_exchanges, replay
from serve.chat.conversation_events import Adapter, Begin, Event, NewerError, User, from_line
from serve.chat.phrases import hint, say
from serve.errors import UserError

FORMAT_LINE = b'{"kind": "conversation", "format": 1}\n'
FORMAT = re.compile(rb'\{"kind": "conversation", "format": (\d+)\}')
KIND = re.compile(rb'\{"kind": "(\w+)"')
SUFFIX = ".jsonl"
MAX_CHOICES = 8
FIRST_WORDS = 60


@dataclass(frozen=True)
class Entry:
    """A conversation in a list. `changed`: seconds since 1970; `first_words`: of the first question, on one line."""

    name: str
    changed: float
    num_exchanges: int
    adapter: str
    first_words: str


def find(folder: Path, name: str) -> str:
    """The conversation of that name, or the only one whose name begins so; raises `UserError` naming the nearest."""
    names = [path.stem for path in _newest_first(folder)]
    name = name.removesuffix(SUFFIX)
    found = [name] if name in names else [other for other in names if other.startswith(name)]
    if len(found) == 1:
        return found[0]
    if not names:
        raise UserError(say("none_kept"))
    if found:
        shown = ", ".join(found[:MAX_CHOICES]) + (", …" if len(found) > MAX_CHOICES else "")
        raise UserError(say("several_begin", name=name, count=len(found), names=shown))
    close = difflib.get_close_matches(name, names, MAX_CHOICES, cutoff=0.5) or names[:MAX_CHOICES]
    raise UserError(say("no_conversation", name=name, hint=hint(name, close)))


def listing(folder: Path) -> Iterator[Entry]:
    """The conversations in which something was said, newest first; each file is read when its entry is asked for."""
    for path in _newest_first(folder):
        with contextlib.suppress(OSError), path.open("rb") as file:
            if entry := _entry(path, file):
                yield entry


def read(path: Path, data: bytes) -> tuple[Conversation, int]:
    """The conversation in `data`, what `path` holds, and how many bytes of it are whole lines; raises `UserError`."""
    end = data.rfind(b"\n") + 1
    if not end and FORMAT_LINE.startswith(data):
        return Conversation(), 0
    first, *lines = data[:end].split(b"\n")[:-1] or [data]
    if not (match := FORMAT.fullmatch(first)):
        raise UserError(say("no_beginning", path=path))
    number = 1

    def events() -> Iterator[Event]:
        nonlocal number
        for line in lines:
            number += 1
            yield from_line(line)

    try:
        if match[1] != b"1":
            raise NewerError(f"format {match[1].decode()}")
        return replay(events()), end
    except NewerError as fault:
        raise UserError(say("newer", path=path, line=number, fault=fault)) from None
    except ValueError as fault:
        cut = path.with_name(f"{path.stem}-cut{SUFFIX}")
        keep = f"head -n {number - 1} {shlex.quote(str(path))} > {shlex.quote(str(cut))}"
        raise UserError(say("damaged", path=path, line=number, fault=fault, keep=keep, name=cut.stem)) from None


def _newest_first(folder: Path) -> list[Path]:
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        # Another terminal may have renamed it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _entry(path: Path, file: BinaryIO) -> Entry | None:
    """What a list shows of a file. Lines are counted, not read: a damaged one is no matter here."""
    if not FORMAT.fullmatch(file.readline(2 * len(FORMAT_LINE)).rstrip(b"\n")):
        return None
    kinds: list[str] = []
    first: User | None = None
    adapter = ""
    for line in file:
        if not line.endswith(b"\n") or not (match := KIND.match(line)):
            continue
        kinds.append(match[1].decode())
        if kinds[-1] not in ("begin", "adapter") and (first or kinds[-1] != "user"):
            continue
        with contextlib.suppress(ValueError):
            event = from_line(line)
            if isinstance(event, Begin):
                adapter = event.adapter
            elif isinstance(event, Adapter):
                adapter = event.name
            elif isinstance(event, User):
                first = event
    if not first:
        return None
    words = " ".join(first.text.split())[:FIRST_WORDS]
    return Entry(path.stem, os.fstat(file.fileno()).st_mtime, count_exchanges(kinds), adapter, words)
