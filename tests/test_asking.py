"""What becomes of several answers to one question; the daemon's part is played here."""

import asyncio
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.chat import actions, asking
from serve.chat.answers import Outcome, Shown
from serve.chat.conversation_events import Answer, Others, Regenerate, User
from serve.chat.conversation_file import ConversationFile
from serve.chat.talk import Talk
from serve.client import Client
from serve.errors import RequestError, ServeError
from serve.pieces import Accepted, Delta, Done, Piece
from serve.protocol import Code

NAMES = ("base", "one", "two")


class Paper:
    """A screen that is read afterwards."""

    has_colour = False

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.offered = ""
        self.choices: list[str] = []

    def print(self, rows: list[str]) -> None:
        self.rows += rows

    def show(self, live: list[str]) -> None:
        pass

    def prefill(self, text: str) -> None:
        self.offered = text

    async def choice(self) -> str:
        return self.choices.pop(0)


class Held:
    """What a client knows of its daemon."""

    is_lost = False

    def __init__(self, hold: str = "adapters", pid: int = 7) -> None:
        adapters = [
            {"name": name, "digest": name[0] * 12, "method": "lora", "context": 100}
            for name in (NAMES if hold == "adapters" else NAMES[1:2])
        ]
        self.adapter = None
        self.info = {"adapters": adapters, "hold": hold, "model": "m", "context": 100}
        self.record = SimpleNamespace(run="runs/my run", pid=pid)

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def tokenize(self, messages: object, adapter: str) -> dict[str, int]:
        return {"tokens": 1, "context": 100}

    async def adapters(self) -> list[dict[str, Any]]:
        return list(self.info["adapters"])


def talk_of(folder: Path, held: Held, adapter: str = "") -> Talk:
    async def never(_: object) -> Client:
        raise AssertionError

    talk = Talk(held, never, ConversationFile(folder))  # type: ignore[arg-type]
    talk.screen = Paper()  # type: ignore[assignment]
    talk.happen(User("hello"), Answer("before"))
    if adapter:
        asyncio.run(actions.adapter(talk, adapter))
    return talk


def answered(text: str) -> Outcome:
    done = Done("stop", {"prompt_tokens": 1, "completion_tokens": 2}, {"decode_ms": 1.0}, "")
    return Outcome([text] if text else [], done=done)


def too_long() -> RequestError:
    return RequestError(Code.CONTEXT, "too long for this one", {"have": 101, "max": 100})


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Outcome]], list[str]]:
    """Have each name answer so; the list of who was asked."""

    def played(outcomes: dict[str, Outcome]) -> list[str]:
        asked: list[str] = []

        async def collect(_: object, __: object, options: dict[str, Any], ___: Callable[[Piece], None]) -> Outcome:
            name = options["adapter"]
            asked.append(name)
            outcomes[name].adapter = f"{name.partition('@')[0]}@{name[0] * 12}"
            return outcomes[name]

        async def connect(_: object) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

        monkeypatch.setattr(asking, "collect", collect)
        monkeypatch.setattr(asking, "connect", connect)
        return asked

    return played


def compare(talk: Talk, names: str) -> None:
    asyncio.run(actions.compare(talk, names))


def kept(talk: Talk) -> str:
    answer = talk.conversation.exchanges[-1].answer
    assert answer is not None
    return answer.text


@pytest.mark.parametrize("adapter", ["two", "two@tt", "two@" + "t" * 12])
def test_the_answer_of_who_answers_anyway_is_kept(tmp_path, play, adapter):
    play({name: answered(f"I am {name}") for name in NAMES})
    talk = talk_of(tmp_path, Held(), adapter)
    compare(talk, "base one two")
    assert kept(talk) == "I am two"
    assert talk.conversation.exchanges[-1].others == {"base@" + "b" * 12: "I am base", "one@" + "o" * 12: "I am one"}


def test_an_answer_without_a_word_is_not_kept_where_another_has_some(tmp_path, play):
    fault = ServeError("it broke; try again")
    play({"base": answered(""), "one": answered("word"), "two": Outcome(fault=fault)})
    talk = talk_of(tmp_path, Held(), "two")
    compare(talk, "base one two")
    assert kept(talk) == "word"
    # Who failed said nothing.
    assert talk.conversation.events[-1] == Others({"base@" + "b" * 12: ""})


def test_every_fault_is_told_with_its_name(tmp_path, play):
    outcomes = {name: Outcome(fault=ServeError(f"{kind} fault")) for name, kind in zip(NAMES, "aba", strict=True)}
    play(outcomes)
    talk = talk_of(tmp_path, Held())
    compare(talk, "base one two")
    assert talk.screen.rows[-2:] == ["error: base, two: a fault", "error: one: b fault"]
    # Nobody answered: what was there comes back, and the comparison is offered.
    assert kept(talk) == "before" and talk.screen.offered == "/compare base one two"


def test_who_answered_is_not_asked_again_because_another_has_no_room(tmp_path, play):
    asked = play({"base": answered("word"), "one": Outcome(fault=too_long())})
    talk = talk_of(tmp_path, Held())
    compare(talk, "base one")
    assert asked == ["base", "one"] and kept(talk) == "word"
    assert "error: one: too long for this one" in talk.screen.rows


def test_where_nobody_has_room_the_person_chooses(tmp_path, play):
    play({"base": Outcome(fault=too_long()), "one": Outcome(fault=too_long())})
    talk = talk_of(tmp_path, Held())
    talk.happen(User("second"), Answer("to it"))
    talk.screen.choices = [""]
    compare(talk, "base one")
    assert talk.screen.rows[-1] == "Not asked." and kept(talk) == "to it"


def test_without_names_the_base_and_who_answers(tmp_path, play):
    asked = play({name: answered(name) for name in NAMES})
    for adapter, other in (("two", "two"), ("base", "one")):
        talk = talk_of(tmp_path / adapter, Held(), adapter)
        compare(talk, "")
        assert asked == ["base", other]
        asked.clear()


def test_a_name_twice_is_one(tmp_path, play):
    asked = play({name: answered(name) for name in (*NAMES, "one@ooo")})
    compare(talk_of(tmp_path, Held()), "one one one@ooo base")
    assert len(asked) == 2


def test_a_merged_model_says_how_to_compare(tmp_path):
    for held, wanted, unwanted in (
        (Held("merged"), "make stop RUN='runs/my run', make chat RUN='runs/my run' HOLD=adapters", "Try on"),
        (Held("merged", pid=0), "Try on runs/my run: make stop", "make chat"),
        (Held("4bit"), "try make load ADAPTER=", "make chat"),
    ):
        talk = talk_of(tmp_path, held)
        with pytest.raises(ServeError) as caught:
            compare(talk, "base one")
        assert wanted in str(caught.value) and unwanted not in str(caught.value)


@pytest.mark.parametrize(
    ("event", "again"), [(User("two"), "two"), (Regenerate(), "/regenerate")], ids=["question", "another answer"]
)
def test_an_adapter_that_was_unloaded_ends_no_client(tmp_path, play, event, again):
    play({"gone": Outcome(fault=ServeError("no adapter 'gone' is loaded"))})
    talk = talk_of(tmp_path, Held())
    talk.happen(actions.Adapter("gone"))
    asyncio.run(asking.exchange(talk, event, again))
    assert talk.screen.offered == again and kept(talk) == "before"


def test_the_toolbar_is_about_the_answer_that_streams(tmp_path):
    talk = talk_of(tmp_path, Held())
    asked = asking.Asking(talk, ["base", "one"])
    shown = Shown(talk.screen, ["base", "one"])
    for number, piece in ((0, Accepted(0, 10, 9, "base", {})), (1, Accepted(0, 20, 9, "one", {})), (1, Delta("a", 3))):
        asked._follow(shown, number, piece)
    assert talk.used == 10
    asked._follow(shown, 0, Delta("b", 1))
    assert talk.used == 11
    shown.end(0, "")
    asked._follow(shown, 1, Delta("c", 4))
    assert talk.used == 24


@pytest.mark.parametrize(
    ("text", "rows"), [("a" * 6, ["aaaaaa [note]"]), ("a" * 13, ["a" * 13, "[note]"]), ("", ["[note]"])]
)
@pytest.mark.parametrize("style", ["", "**"])
def test_a_note_is_not_cut_in_two(monkeypatch, text, rows, style):
    monkeypatch.setenv("COLUMNS", "20")
    paper = Paper()
    paper.has_colour = True
    shown = Shown(paper, [""])
    if text:
        shown.add(0, Delta(f"{style}{text}{style}", 1))
    shown.end(0, "[note]")
    assert [re.sub(r"\x1b\[\d*m", "", row) for row in paper.rows] == rows
