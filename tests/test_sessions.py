"""The pure parts: conversation, commands, slots, printable text, arguments."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve import arguments, commands
from serve.arguments import Arguments
from serve.echo import EchoEngine, Utf8Detokenizer
from serve.engine import BASE, AdapterInfo, Sampling
from serve.errors import UserError
from serve.printable import printable
from serve.sessions import Conversation
from serve.slots import Request, SlotTable, answer_limit
from serve.submission import Submission

STOPS = (256,)
ADAPTER = AdapterInfo(BASE, "", "none", context=16)


def request(name: bytes, limit: int = 10, client: int = 1, **options: Any) -> Request:
    asked = Submission([{"role": "user", "content": "x"}], max_tokens=limit, **options)
    return Request(name, client, [1, 2], asked, ADAPTER, Utf8Detokenizer())


def test_turns_alternate_whatever_happens() -> None:
    talk = Conversation()
    talk.add_user("one")
    talk.add_answer("1")
    talk.add_user("two")
    talk.add_answer("2, but", is_interrupted=True)
    talk.add_user("three")
    talk.add_answer("", is_interrupted=True)
    assert [m["role"] for m in talk.messages()] == ["user", "assistant"] * 2
    assert talk.messages()[-1]["content"] == "2, but"
    assert talk.turns[-1].is_interrupted
    with pytest.raises(AssertionError):
        talk.add_answer("nobody asked")
    talk.reset()
    assert talk.messages() == []


@pytest.mark.parametrize("text", ["hello", "/etc/passwd is what?", " /help", "a /help", "", "/9"])
def test_a_prompt_is_no_command(text: str) -> None:
    assert commands.parse(text) == commands.Line(prompt=text)


def test_commands() -> None:
    assert commands.parse("/quit ").command == "/quit"
    assert "did you mean /reset?" in commands.parse("/rest").problem
    assert "takes nothing" in commands.parse("/help me").problem
    assert "/help" in commands.parse("/").problem
    assert all(name in commands.help_text() for name in commands.COMMANDS)


def test_slots_are_first_come_first_served() -> None:
    table = SlotTable(2)
    for name in (b"a", b"b", b"c", b"d"):
        table.add(request(name))
    first, second = table.admit(), table.admit()
    assert first and second and table.admit() is None
    assert (first[1].id, second[1].id) == (b"a", b"b")
    assert table.withdraw(b"c") and not table.withdraw(b"c") and not table.withdraw(b"a")
    table.release(first[0])
    third = table.admit()
    assert third and third[1].id == b"d" and third[0] == first[0]
    assert table.find(b"b") == second[0] and table.find(b"a") is None


def test_clients_take_turns() -> None:
    table = SlotTable(2)
    for name, client in ((b"a", 1), (b"b", 1), (b"c", 1), (b"d", 2)):
        table.add(request(name, client=client))
    admitted = [table.admit(), table.admit()]
    assert [entry[1].id for entry in admitted if entry] == [b"a", b"d"]
    assert table.uses(BASE) and not table.uses("other")
    table.release(0 if admitted[0] and admitted[0][0] == 0 else 1)
    again = table.admit()
    assert again and again[1].id == b"b"


def test_an_answer_ends_at_a_stop_token_and_at_its_limit() -> None:
    asked = request(b"a", limit=2)
    assert asked.take(65, STOPS) == ("A", None)
    assert asked.take(66, STOPS) == ("B", "length")
    asked = request(b"a", limit=2)
    assert asked.take(256, STOPS) == ("", "stop")
    assert asked.generated == 0
    asked = request(b"a", stop=("bc",))
    assert [asked.take(byte, STOPS) for byte in b"abc"] == [("a", None), ("", None), ("", "stop")]
    assert asked.stop == "bc"
    assert (answer_limit(10, None, 16), answer_limit(10, 3, 16), answer_limit(10, 30, 16)) == (6, 3, 6)


def test_a_character_is_never_split() -> None:
    asked = request(b"a")
    pieces = [asked.take(byte, STOPS)[0] for byte in "ñ🦊".encode()]
    assert pieces == ["", "ñ", "", "", "", "🦊"]
    cut = request(b"a")
    cut.take("ñ".encode()[0], STOPS)
    assert cut.take(256, STOPS) == ("\ufffd", "stop")


def test_the_echo_engine_echoes() -> None:
    engine = EchoEngine()
    ids = engine.prompt_ids([{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}])
    assert engine.start(3, ids, Sampling(), BASE) == 0
    (read,) = engine.prefill([3])
    assert (read.done, read.total, read.token) == (len(ids), len(ids), 97)
    assert [engine.step(), engine.step()] == [{3: 98}, {3: engine.STOP}]
    engine.free(3)
    with pytest.raises(ValueError, match="last turn"):
        engine.prompt_ids([{"role": "assistant", "content": "x"}])


def test_control_characters_are_shown_not_obeyed() -> None:
    assert printable("a\x1b[31m\x9b\x07\rb\n\tñ🦊") == "a\\x1b[31m\\x9b\\x07\\x0db\n\tñ🦊"
    assert printable("\u202eevil") == "\\u202eevil"


def write_run(folder: Path, state: str) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"format": 1, "state": state, "command": "make train RUN=x"}))


def test_a_bare_name_means_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "x", "finished")
    write_run(tmp_path / "elsewhere", "finished")
    assert arguments.parse("daemon", ["RUN=x", "HOLD="]) == Arguments("runs/x", ("runs/x",))
    assert arguments.locate("runs/x/") == "runs/x"
    assert arguments.locate("elsewhere") == "elsewhere"
    assert arguments.locate("nothing") == "runs/nothing"
    assert arguments.require_finished(Arguments()).run == "runs/x"


def test_a_run_that_cannot_be_served_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no finished run.*make train$"):
        arguments.require_finished(Arguments())
    write_run(tmp_path / "runs" / "half", "running")
    with pytest.raises(UserError, match=r"^runs/half is not finished \(running\).*make train RUN=x.*make train$"):
        arguments.require_finished(Arguments("runs/half"))
    with pytest.raises(UserError, match=r"^runs/none is not a run; .*make train$"):
        arguments.require_finished(Arguments("runs/none"))


@pytest.mark.parametrize(
    ("command", "word", "hint"),
    [
        ("daemon", "RUNN=x", "did you mean RUN?"),
        ("daemon", "x", "Try: make serve"),
        ("daemon", "HOLD=merge", "did you mean merged?"),
        ("daemon", "START=yes", "choose from|did you mean"),
        ("chat", "HOLD=merged", "START=yes"),
    ],
)
def test_a_mistyped_word_gets_the_nearest(command: str, word: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint.replace("?", r"\?")):
        arguments.parse(command, [word])
