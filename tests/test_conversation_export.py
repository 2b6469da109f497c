"""What a conversation becomes for people and for a training."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

import launcher.errors
from launcher import data, shapes, sources
from launcher.config import Data
from serve.chat.conversation import replay
from serve.chat.conversation_events import Answer, Drop, Others, System, User
from serve.chat.export import LEAST_TO_TRAIN, to_markdown, to_messages_line
from serve.chat.export_file import add_line
from serve.errors import UserError
from tests.test_conversation import drawn_events, talk

CODE = "Try:\n\n```python\ndef f():\n\treturn '##'\n```"


def test_markdown() -> None:
    said = talk(
        System("s"),
        User("one\n~~~\nopen"),
        Answer(CODE, adapter="x"),
        Others({"y": "eins"}),
        Drop(1),
        User("two"),
        Answer("````\n```\ncut", is_interrupted=True),
        User("`` `x` `` and ```a```"),
    )
    assert to_markdown(said) == (
        f"## System\n\ns\n\n## User\n\none\n~~~\nopen\n~~~\n\n## x\n\n{CODE}\n\n## y (not kept)\n\neins\n\n## User\n\ntwo\n\n"
        "## Answer (interrupted)\n\n````\n```\ncut\n````\n\n## User\n\n`` `x` `` and ```a```\n"
    )
    assert to_markdown(talk(User("half \ud83d"))) == "## User\n\nhalf ?\n"


@pytest.mark.parametrize(
    ("text", "closing"),
    [
        ("```\r\nx\r\n```\r", ""),
        ("```\n```py\ncut", "```"),
        ("```a``` begins no block", ""),
        ("~~~ `a`\ncut", "~~~"),
        ("    ```\nis code by its indent", ""),
        ("````\n```\n`````", ""),
    ],
)
def test_a_block_of_code_is_closed_only_if_it_is_open(text: str, closing: str) -> None:
    assert to_markdown(talk(User(text))) == f"## User\n\n{text}\n" + (f"{closing}\n" if closing else "")


def learned(tmp_path: Path, *lines: str) -> list[Any]:
    """What the launcher reads from a file of these lines."""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    found = list(sources.records(Data(source=str(file))))
    assert not [item for item in found if isinstance(item, sources.Fault)], found
    splits = data.read(Data(source=str(file)))
    assert len(splits.train) + len(splits.held_out) == len(lines) and splits.shapes == {shapes.MESSAGES: len(lines)}
    return [shapes.conversation(item.value)[1] for item in found if isinstance(item, sources.Record)]


def test_a_training_reads_the_line_and_learns_no_interrupted_answer(tmp_path: Path) -> None:
    said = talk(
        System("s"), User("one"), Answer("1 \u2028 ñ\nx"), User("two"), Answer("2, but", is_interrupted=True),
        User("three"), Answer(" "), User(""), Answer("what?"), User("four \ud83d"), Answer("4"), User("open"), Drop(2),
    )  # fmt: skip
    other = talk(User("a"), Answer("b"))
    first, second = learned(tmp_path, to_messages_line(said), to_messages_line(other))
    assert [(m["role"], m["content"]) for m in first] == [
        ("system", "s"), ("user", "one"), ("assistant", "1 \u2028 ñ\nx"), ("user", "four ?"), ("assistant", "4"),
    ]  # fmt: skip
    assert [m["content"] for m in second] == ["a", "b"]


def test_whatever_was_said_a_training_reads_it(tmp_path: Path) -> None:
    lines = []
    for seed in range(60):
        conversation = replay(drawn_events(seed)[0])
        try:
            lines.append(to_messages_line(conversation))
        except UserError:
            assert not any(e.answer and e.answer.text == "words" and e.question for e in conversation.exchanges)
    assert len(lines) > 20
    learned(tmp_path, *lines)


def test_nothing_to_learn() -> None:
    said = talk(System("s"), User("one"), Answer("1, but", is_interrupted=True), User("open"))
    with pytest.raises(UserError, match="nothing to learn"):
        to_messages_line(said)
    assert json.loads(to_messages_line(talk(System(" "), User("a"), Answer("b"))))["messages"][0] == {
        "role": "user",
        "content": "a",
    }


@pytest.mark.parametrize("number", [1, LEAST_TO_TRAIN])
def test_a_training_takes_as_many_conversations_as_is_said(tmp_path: Path, number: int) -> None:
    path = tmp_path / "talk.jsonl"
    for each in range(number):
        line = to_messages_line(talk(User(f"question {each}"), Answer("answer")))
        assert add_line(path, line) == each + 1
        # The same once more is not learned twice.
        assert add_line(path, line) == each + 1
    assert path.stat().st_mode & 0o777 == 0o600
    if number < LEAST_TO_TRAIN:
        with pytest.raises(launcher.errors.UserError, match="leave none to train on"):
            data.read(Data(source=str(path)))
    else:
        assert data.read(Data(source=str(path))).train


@pytest.mark.parametrize("held", [b"x\n", b"[]\n", b'{"text": "a"}\n', b'{"messages": 1}\n', b"\xff\n", b"[" * 100_000])
def test_nothing_is_added_to_another_kind_of_file(tmp_path: Path, held: bytes) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_bytes(held)
    with pytest.raises(UserError, match=r"talk\.jsonl:1: no conversation for a training"):
        add_line(path, to_messages_line(talk(User("a"), Answer("b"))))
    assert path.read_bytes() == held and list(tmp_path.iterdir()) == [path]


def test_a_conversation_goes_behind_a_line_without_an_end_and_where_a_link_points(tmp_path: Path) -> None:
    path, link = tmp_path / "talk.jsonl", tmp_path / "link.jsonl"
    path.write_text('{"messages": []}')
    link.symlink_to(path)
    line = to_messages_line(talk(User("a"), Answer("b")))
    assert add_line(link, line) == 2
    assert link.is_symlink() and path.read_text() == f'{{"messages": []}}\n{line}'
    (tmp_path / "folder.jsonl").mkdir()
    for wrong in ("folder.jsonl", "nowhere/talk.jsonl"):
        with pytest.raises(UserError, match="try another path"):
            add_line(tmp_path / wrong, line)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.jsonl"
    line = to_messages_line(talk(User("a"), Answer("b")))
    add_line(path, line)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        add_line(path, to_messages_line(talk(User("c"), Answer("d"))))
    assert path.read_text() == line and list(tmp_path.iterdir()) == [path]
