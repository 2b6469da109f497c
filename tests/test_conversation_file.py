"""Conversations on the disk: nothing that was said is lost, nothing is written over."""

import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

from serve.chat.conversation import replay
from serve.chat.conversation_events import (
    Adapter,
    Answer,
    Begin,
    Event,
    System,
    User,
    Withdraw,
    to_line,
)
from serve.chat.conversation_file import ConversationFile
from serve.chat.conversation_read import FORMAT_LINE, listing
from serve.errors import UserError
from tests.conversations import BEGIN, SAID, resumed, written


def test_what_was_said_is_there_again_and_others_cannot_look(tmp_path: Path) -> None:
    path = written(tmp_path / "a" / "b", *SAID)
    assert path.read_bytes() == FORMAT_LINE + b"".join(map(to_line, SAID))
    assert resumed(path) == replay(SAID)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent)] == [0o600, 0o700]
    time.strptime(path.stem, "%Y-%m-%d-%H%M")


def test_each_event_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(str(Path(f"/proc/self/fd/{file}").readlink())))
    folder = tmp_path / "new"
    file = ConversationFile(folder)
    for event in SAID[:4]:
        file.append(event)
        assert not file.path.exists() or file.path.read_bytes().endswith(to_line(event))
    assert synced == [str(tmp_path), str(file.path), str(folder), str(file.path)]
    file.close()


def test_a_conversation_without_a_turn_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    written(folder, BEGIN, System("s"), Adapter("y"))
    assert not folder.exists()
    path = written(folder, BEGIN, User("one"), Withdraw())
    assert not path.exists()
    # A question that a kill left open is something to go on with.
    path = written(folder, BEGIN, User("one"))
    assert resumed(path).open_question == "one" and path.exists()


def test_who_only_looks_writes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, *SAID)
    before = path.read_bytes()
    later = Begin("runs/y", "n", "y", 2.0)
    file = ConversationFile.resume(tmp_path, path.stem)
    assert file.append(later) == file.close() == "" and path.read_bytes() == before
    file = ConversationFile.resume(tmp_path, path.stem)
    assert file.append(later) == file.append(System("t")) == file.append(later) == file.close() == ""
    assert resumed(path) == replay([*SAID, later, System("t")])


def test_a_file_torn_at_any_byte_has_every_whole_line_and_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path, *SAID)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        num_events = max(whole[:size].count(b"\n") - 1, 0)
        file = ConversationFile.resume(tmp_path, path.stem)
        assert file.conversation.events == SAID[:num_events]
        after: list[Event] = [Withdraw()] if file.conversation.open_question else []
        after += [User("more"), Answer("m")]
        assert {file.append(event) for event in after} == {""} and file.close() == ""
        assert resumed(path).events == SAID[:num_events] + after


def test_of_a_torn_line_nothing_stays(tmp_path: Path) -> None:
    path = written(tmp_path, *SAID)
    whole = path.read_bytes()
    path.write_bytes(whole + to_line(User("long " * 99))[:-1])
    file = ConversationFile.resume(tmp_path, path.stem)
    file.append(User("short"))
    file.close()
    assert path.read_bytes() == whole + to_line(User("short"))


def hold(folder: Path, name: str, ready: object, leave: object) -> None:
    file = ConversationFile.resume(folder, name)
    ready.set()  # type: ignore[attr-defined]
    leave.wait()  # type: ignore[attr-defined]
    file.close()


def test_only_one_client_writes(tmp_path: Path) -> None:
    path = written(tmp_path, *SAID, name="x")
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, "x", ready, leave))
    other.start()
    assert ready.wait(60)
    try:
        with pytest.raises(UserError, match=r"^x is open in another terminal; try"):
            ConversationFile.resume(tmp_path, "x")
    finally:
        leave.set()
        other.join(60)
    assert resumed(path) == replay(SAID)
    new = ConversationFile(tmp_path)
    new.append(User("one"))
    with pytest.raises(UserError, match="another terminal"):
        ConversationFile.resume(tmp_path, new.name)
    new.close()


def test_two_that_begin_in_the_same_minute(tmp_path: Path) -> None:
    files = [ConversationFile(tmp_path) for _ in range(3)]
    for file in files:
        file.name = "2026-11-26-0312"
        file.append(User(f"one of {id(file)}"))
    assert [file.name for file in files] == ["2026-11-26-0312", "2026-11-26-0312-2", "2026-11-26-0312-3"]
    for file in files:
        file.close()
    # Nothing was answered, and the questions are open: all of them stay.
    assert {entry.name for entry in listing(tmp_path)} == {file.name for file in files}


def test_save_renames_and_never_overwrites(tmp_path: Path) -> None:
    other = written(tmp_path, User("other"), Answer("o"), name="other")
    before = other.read_bytes()
    new = ConversationFile(tmp_path)
    with pytest.raises(UserError, match="other is taken; try another name"):
        new.save("other")
    new.append(User("one"))
    old = new.path
    with pytest.raises(UserError, match="other is taken; try another name"):
        new.save("other")
    for bad in ("", ".", "..", "a/b", "/tmp/x", ".hidden", "-x", "a b", "x\n", "x" * 61, "a\0"):
        with pytest.raises(UserError, match="cannot be a name"):
            new.save(bad)
    assert new.save("año-1.b_c") == new.save("año-1.b_c.jsonl") == "" and new.name == "año-1.b_c" and not old.exists()
    new.append(Answer("1"))
    new.close()
    assert resumed(tmp_path / "año-1.b_c.jsonl").events == [User("one"), Answer("1")]
    assert other.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    longest = written(tmp_path, User("one"), name="ñ" * 60)
    assert longest.exists()


def test_a_rename_that_fails_leaves_nothing(tmp_path: Path) -> None:
    file = ConversationFile(tmp_path)
    file.append(User("one"))
    file.path.unlink()
    with pytest.raises(UserError, match=r"No such file.*; it is still 20.*, try again$"):
        file.save("new")
    file.close()
    assert list(tmp_path.iterdir()) == []
