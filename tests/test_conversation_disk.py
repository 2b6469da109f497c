"""A disk that is full, a folder that cannot be written: the conversation goes on, and is whole later."""

import fcntl
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve.chat.conversation import replay
from serve.chat.conversation_events import Answer, Undo, User, to_line
from serve.chat.conversation_file import ConversationFile
from tests.conversations import SAID, resumed, written


@contextmanager
def no_room(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_loses_no_turn(tmp_path: Path) -> None:
    path = written(tmp_path, *SAID, name="x")
    whole = path.read_bytes()
    file = ConversationFile.resume(tmp_path, "x")
    with no_room(len(whole) + 10):
        told = file.append(User("three"))
        assert told.startswith(f"{path}: File too large; the conversation goes on unsaved") and "\n" not in told
        assert file.append(Answer("3")) == ""
        assert path.read_bytes().startswith(whole)
        assert file.conversation.messages()[-1]["content"] == "3"
        assert file.save("x").startswith(str(path))
    assert file.append(User("four")) == ""
    assert path.read_bytes() == whole + to_line(User("three")) + to_line(Answer("3")) + to_line(User("four"))
    # It is told again when it begins again, and at the end.
    with no_room(0):
        assert file.append(Answer("4")) and not file.append(Undo()) and file.close()
    assert resumed(path).open_question == "four"


def test_a_full_disk_from_the_beginning(tmp_path: Path) -> None:
    with no_room(0):
        file = ConversationFile(tmp_path)
        assert [bool(file.append(event)) for event in SAID] == [False, False, True, False, False, False]
    assert file.close() == "" and resumed(file.path) == replay(SAID)
    with no_room(0):
        lost = ConversationFile(tmp_path)
        lost.append(User("one"))
        assert lost.close() and not lost.path.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = ConversationFile(tmp_path / "file" / "folder")
    assert "Not a directory" in file.append(User("one")) and not file.append(Answer("1"))
    file.save("named")
    (tmp_path / "file").unlink()
    assert not file.append(User("two")) and not file.close()
    assert resumed(tmp_path / "file" / "folder" / "named.jsonl").num_exchanges == 1


def test_a_file_that_cannot_be_locked_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    file = ConversationFile(tmp_path)
    assert "No locks available" in file.append(User("one")) and not file.append(Answer("1"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert file.close() == "" and resumed(file.path).num_exchanges == 1
