"""Shared by the tests of conversations: one that was said, and its way to the disk and back."""

from pathlib import Path

from serve.chat.conversation import Conversation
from serve.chat.conversation_events import Answer, Begin, Event, System, User
from serve.chat.conversation_file import ConversationFile

BEGIN = Begin("runs/x", "m", "x", 1.5)
SAID: list[Event] = [BEGIN, System("s"), User("one"), Answer("1\nñ", adapter="x"), User("two"), Answer("2")]


def written(folder: Path, *events: Event, name: str = "") -> Path:
    """The file of a conversation in which `events` happened."""
    file = ConversationFile(folder)
    if name:
        file.save(name)
    assert [file.append(event) for event in events] == [""] * len(events)
    assert file.close() == ""
    return file.path


def resumed(path: Path) -> Conversation:
    file = ConversationFile.resume(path.parent, path.stem)
    file.close()
    return file.conversation
