"""Conversations in files: one event a line, appended and on the disk before `append` returns.

    <folder>/<name>.jsonl     0600 in a 0700 folder; the first line says the format, each other one is an event

A kill may leave half a line at the end: it is overlooked, and cut off before the next line is written. Who holds the lock of
a file writes to it, the kernel lets go.
"""

import contextlib
import fcntl
import itertools
import os
import re
import time
from pathlib import Path

from serve.chat.conversation import Conversation
from serve.chat.conversation_events import Answer, Begin, Event, User, to_line
from serve.chat.conversation_read import FORMAT_LINE, SUFFIX, find, read
from serve.chat.phrases import say
from serve.errors import UserError

# 60 letters of four bytes, and the suffix, are still a file name.
NAME = re.compile(r"\w[\w.-]{,59}")


class ConversationFile:
    """A conversation and its file, which there is none of until somebody asks something.

    Events happen through `append` alone. Where they cannot be written the conversation goes on in memory, and each later
    event tries to write all that is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.conversation = Conversation()
        self.name = time.strftime("%Y-%m-%d-%H%M")
        self._folder = folder
        self._file: int | None = None
        # How many bytes of the file are whole and on the disk, and what shall follow them.
        self._end = 0
        self._missing = FORMAT_LINE
        self._has_news = False
        self._is_worth_keeping = False
        self._is_told = False

    @classmethod
    def resume(cls, folder: Path, name: str) -> "ConversationFile":
        """Go on with the one that `find` finds; raises `UserError` if it is open elsewhere, damaged, or newer than us."""
        resumed = cls(folder)
        resumed.name = find(folder, name)
        try:
            file = os.open(resumed.path, os.O_RDWR)
        except OSError as fault:
            raise UserError(say("conversation_fault", path=resumed.path, fault=fault.strerror)) from None
        with contextlib.ExitStack() as unless_done:
            unless_done.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(say("open_elsewhere", name=resumed.name)) from None
            with open(file, "rb", closefd=False) as whole:
                resumed.conversation, resumed._end = read(resumed.path, whole.read())
            unless_done.pop_all()
        resumed._file = file
        resumed._missing = b"" if resumed._end else FORMAT_LINE
        resumed._is_worth_keeping = resumed._end > 0
        return resumed

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        return self._folder / f"{self.name}{SUFFIX}"

    @property
    def is_begun(self) -> bool:
        """Whether the file is there: it is not before somebody asks something."""
        return self._file is not None

    def append(self, *events: Event) -> str:
        """Let `events` happen and write them at once; returns a line to show when writing begins to fail, otherwise ""."""
        for event in events:
            self.conversation.apply(event)
            # That somebody came and looked is no news: it is written with what they say.
            self._has_news |= not isinstance(event, Begin)
            self._is_worth_keeping |= isinstance(event, User)
        self._missing += b"".join(map(to_line, events))
        fault, was_told = self._write(), self._is_told
        self._is_told = bool(fault)
        return "" if was_told else fault

    def save(self, name: str) -> str:
        """Rename it; returns a line to show if it is not written, otherwise "". `UserError`: a bad or a taken name."""
        name = name.removesuffix(SUFFIX)
        path = self._folder / f"{name}{SUFFIX}"
        if not NAME.fullmatch(name):
            raise UserError(say("no_name", name=name))
        if name != self.name:
            if self._file is not None:
                self._rename(path)
            elif os.access(path, os.F_OK):
                raise UserError(say("name_taken", name=name))
            self.name = name
        return self._write()

    def close(self) -> str:
        """Let go of the file; returns a line to show if something is not written, otherwise ""."""
        fault = self._write()
        if self._file is not None:
            talk = self.conversation
            is_empty = talk.open_question is None and not any(isinstance(event, Answer) for event in talk.events)
            if is_empty or not self._end:
                with contextlib.suppress(OSError):
                    self.path.unlink()
            os.close(self._file)
            self._file = None
        return fault

    def _rename(self, path: Path) -> None:
        try:
            # The name is claimed first: of two who want it one must be refused.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            with contextlib.ExitStack() as unless_done:
                unless_done.callback(path.unlink)
                self.path.replace(path)
                unless_done.pop_all()
        except FileExistsError:
            raise UserError(say("name_taken", name=path.stem)) from None
        except OSError as fault:
            raise UserError(say("not_renamed", path=path, fault=fault.strerror, name=self.name)) from None
        # It has its new name, if not for certain after a power cut.
        with contextlib.suppress(OSError):
            _sync_folder(self._folder)

    def _write(self) -> str:
        """Put what is missing on the disk, if it is worth keeping; returns why it could not be."""
        if not (self._has_news and self._is_worth_keeping):
            return ""
        try:
            if self._file is None:
                self._file = self._create()
            # Cuts off what a kill or a full disk left of a line.
            os.ftruncate(self._file, self._end)
            written = 0
            while written < len(self._missing):
                written += os.pwrite(self._file, self._missing[written:], self._end + written)
            os.fsync(self._file)
            if not self._end:
                _sync_folder(self._folder)
        except OSError as fault:
            return say("unsaved", path=self.path, fault=fault.strerror)
        self._end += written
        self._missing = b""
        self._has_news = False
        return ""

    def _create(self) -> int:
        if not self._folder.is_dir():
            self._folder.mkdir(mode=0o700, parents=True)
            _sync_folder(self._folder.parent)
        wanted = self.name
        for number in itertools.count(2):
            with contextlib.suppress(FileExistsError):
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                break
            self.name = f"{wanted}-{number}"
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            self.path.unlink()
            raise
        return file


def _sync_folder(folder: Path) -> None:
    """What was created or renamed in it is on the disk."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
