"""Exported conversations in files, for the eyes of who wrote them (0600) until they say otherwise."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from serve.chat.phrases import say
from serve.errors import UserError


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet; raises `UserError`."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(say("file_exists", path=path)) from None
    except OSError as fault:
        raise _failed(path, fault) from None


def add_line(path: Path, line: str) -> int:
    """Put a conversation behind those of a data file, or begin one; how many it holds. One that is there stays single.

    The file is replaced as a whole, so that a full disk or a kill leaves the old one. Raises `UserError`, also for a file
    that holds anything else.
    """
    # What a link points to is replaced, not the link.
    whole = Path(os.path.realpath(path))
    if whole.exists() and not whole.is_file():
        raise UserError(say("not_regular", path=path))
    try:
        descriptor, name = tempfile.mkstemp(dir=whole.parent, prefix=".export-")
        with contextlib.ExitStack() as unless_done:
            unless_done.callback(Path(name).unlink)
            with os.fdopen(descriptor, "wb") as new:
                number = _copy(path, whole, new, line.encode())
                os.fsync(new.fileno())
            Path(name).replace(whole)
            unless_done.pop_all()
    except OSError as fault:
        raise _failed(path, fault) from None
    return number


def _copy(path: Path, whole: Path, new: BinaryIO, line: bytes) -> int:
    """The conversations that are there, and this one if it is not among them."""
    number, is_there = 0, False
    with whole.open("rb") if whole.exists() else contextlib.nullcontext(()) as old:
        for place, row in enumerate(old, 1):
            if not row.strip():
                continue
            if not _is_conversation(row):
                raise UserError(say("not_conversations", path=path, line=place))
            new.write(row.rstrip(b"\n") + b"\n")
            is_there |= row.rstrip(b"\n") == line.rstrip(b"\n")
            number += 1
    if not is_there:
        new.write(line)
        number += 1
    new.flush()
    return number


def _is_conversation(row: bytes) -> bool:
    try:
        record = json.loads(row)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("messages"), list)


def _failed(path: Path, fault: OSError) -> UserError:
    return UserError(say("export_fault", path=path, fault=fault.strerror))
