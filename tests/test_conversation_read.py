"""Files of conversations that are damaged, foreign, listed and found."""

import itertools
import os
from pathlib import Path

import pytest

from serve.chat.conversation_events import Adapter, Answer, Event, Regenerate, Undo, User, to_line
from serve.chat.conversation_file import ConversationFile
from serve.chat.conversation_read import FORMAT_LINE, Entry, find, listing
from serve.errors import UserError
from tests.conversations import BEGIN, SAID, resumed, written


def test_an_empty_file_is_removed_and_no_foreign_one_is_touched(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(FORMAT_LINE[:9])
    resumed(empty)
    assert not empty.exists()
    for text in (
        "not mine, and no line end",
        "not mine\n",
        '{"messages": []}\n',
        '{"kind": "user", "text": "x"}\n' * 2,
    ):
        foreign = tmp_path / "foreign.jsonl"
        foreign.write_text(text)
        with pytest.raises(UserError, match=r"foreign\.jsonl:1: not the beginning of a conversation"):
            resumed(foreign)
        assert foreign.read_text() == text and list(listing(tmp_path)) == []


@pytest.mark.parametrize(
    ("line", "replaced", "says"),
    [
        (3, b'{"kind": "sys\0', r":3: damaged \(not a line of JSON\); try: head -n 2 .*-cut.jsonl, and resume x-cut$"),
        (5, to_line(User("again")), ":5: damaged .a question is open already"),
        (5, b"", ":5: damaged"),
        (2, b'{"kind": "laugh"}\n', ":2: unknown event 'laugh', from a newer Afinar; try to update"),
        (1, FORMAT_LINE.replace(b"1", b"2"), ":1: format 2, from a newer Afinar; try to update"),
    ],
)
def test_a_damaged_or_newer_line_is_told(tmp_path: Path, line: int, replaced: bytes, says: str) -> None:
    path = written(tmp_path, *SAID, name="x")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = replaced if replaced.endswith(b"\n") else replaced + b"\n"
    path.write_bytes(b"".join(lines))
    for _ in range(2):
        with pytest.raises(UserError, match=says) as told:
            resumed(path)
        assert "\n" not in str(told.value)


def test_what_is_advised_for_a_damaged_line_works(tmp_path: Path) -> None:
    path = written(tmp_path / "a b", *SAID, name="x")
    path.write_bytes(path.read_bytes().replace(b'"text": "two"', b'"text": two"'))
    with pytest.raises(UserError) as told:
        resumed(path)
    os.system(str(told.value).split("try: ")[1].split(", and")[0])
    assert resumed(path.with_name("x-cut.jsonl")).events == SAID[:4]


def test_the_list_is_newest_first(tmp_path: Path) -> None:
    assert list(listing(tmp_path / "none")) == []
    again: list[Event] = [User("  first\n words " + "x" * 90), Answer("1"), Regenerate(), Answer("2"), Adapter("y")]
    paths = [
        written(tmp_path, BEGIN, *again, name="a"),
        written(tmp_path, *SAID, Undo(), name="b"),
        written(tmp_path, BEGIN, User("open"), name="c"),
        written(tmp_path, *SAID, name="d"),
    ]
    for path, changed in zip(paths, itertools.count(1000), strict=False):
        if path.stem == "b":
            # Neither a torn nor a damaged line keeps it from being listed.
            path.write_bytes(
                path.read_bytes() + b'damaged\n{"kind": "adapter", "name": 3}\n{"kind": "user", "text": "to'
            )
        os.utime(path, (changed, changed))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "torn.jsonl").write_bytes(FORMAT_LINE + to_line(BEGIN) + b'{"ki')
    assert list(listing(tmp_path)) == [
        Entry("d", 1003.0, 2, "x", "one"),
        Entry("c", 1002.0, 0, "x", "open"),
        Entry("b", 1001.0, 1, "x", "one"),
        Entry("a", 1000.0, 1, "y", "first words " + "x" * 48),
    ]


def test_a_name_is_found_by_its_beginning(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no conversation is kept yet"):
        find(tmp_path, "x")
    for name in ("menu", "menu-2", "2026-11-26-0312"):
        written(tmp_path, *SAID, name=name)
    assert [find(tmp_path, name) for name in ("menu", "menu-2.jsonl", "2026")] == ["menu", "menu-2", "2026-11-26-0312"]
    with pytest.raises(UserError, match=r"^no conversation mneu; did you mean menu\?"):
        find(tmp_path, "mneu")
    with pytest.raises(UserError, match=r"^men is the beginning of 2 conversations; choose from: menu-2, menu$"):
        find(tmp_path, "men")
    for number in range(20):
        written(tmp_path, *SAID, name=f"z{number}")
    with pytest.raises(UserError, match=r"of 20 conversations; choose from: z19, .*, z12, …$"):
        find(tmp_path, "z")
    with pytest.raises(UserError, match=r"choose from: z19, z18, .*z12$"):
        find(tmp_path, "qqq")
    with pytest.raises(UserError, match="did you mean"):
        ConversationFile.resume(tmp_path, "mnu")
