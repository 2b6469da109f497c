"""The system turn that all training examples share is the run's: kept, put in front of questions, and shown."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from launcher import rundir
from launcher.data import Splits
from serve.chat import actions, asking
from serve.chat.answers import Outcome
from serve.engine import AdapterInfo
from serve.protocol import Kind
from tests.pipes import objects
from tests.serve_fixtures import Box, RawClient, Screen, box
from tests.test_asking import Held, answered, talk_of

__all__ = ["box"]
PLAIN = [{"role": "user", "content": "hola"}]


def talk(*turns: tuple[str, str]) -> list[Any]:
    return [{"role": role, "content": text} for role, text in turns]


ASKED = (("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize(
    ("train", "system"),
    [
        ([talk(("system", "S"), *ASKED)] * 2, "S"),
        ([talk(("system", "S"), *ASKED), talk(*ASKED)], None),
        ([talk(("system", "S"), *ASKED), talk(("system", "T"), *ASKED)], None),
        ([talk(*ASKED)] * 2, None),
        ([talk(("text", "S"))], None),
    ],
    ids=["all the same", "one without", "two", "none", "plain text"],
)
def test_it_is_the_runs_only_if_all_examples_have_it(train: list[Any], system: str | None) -> None:
    assert Splits(train, [talk(("system", "X"), *ASKED)]).system == system


def test_runs_of_earlier_versions_have_none() -> None:
    assert (rundir.system({}), rundir.system({"system": None}), rundir.system({"system": "S"})) == ("", "", "S")


def test_a_conversation_with_its_own_keeps_it() -> None:
    info = AdapterInfo("x", "", "lora", 100, system="S")
    own = talk(("system", "T"), ("user", "hola"))
    assert info.as_trained(own) is own
    assert info.as_trained(PLAIN) == talk(("system", "S"), ("user", "hola"))
    assert AdapterInfo("base", "", "none", 100).as_trained(PLAIN) is PLAIN


@pytest.fixture
def two(box: Box) -> Box:
    """A daemon that serves `one`, trained with the system turn `abc`, and `two`, trained without."""
    for name in ("one", "two"):
        (box.work / name).mkdir()
        (box.work / name / "prefix").write_text(f"{name}: ")
    (box.work / "one" / "system").write_text("abc")
    box.daemon(0.0, "RUNS=./one ./two")
    return box


# A token for each byte, and one for each turn.
QUESTION, ABC, X = 5, 4, 2


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        (("--adapter", "one"), ABC + QUESTION),
        (("--adapter", "one", "--system", "x"), X + QUESTION),
        (("--adapter", "two"), QUESTION),
        (("--adapter", "base"), QUESTION),
    ],
)
def test_a_pipe_reads_it(two: Box, words: tuple[str, ...], tokens: int) -> None:
    done = two.run("chat", "--json", *words, stdin="hola")
    assert objects(done.stdout)[0]["prompt_tokens"] == tokens, done.stderr


def test_the_daemon_puts_it_in_front_for_every_client(two: Box) -> None:
    with RawClient(two.record("one")) as client:
        known = client.ask(Kind.ADAPTERS).body["adapters"]
        assert {each["name"]: each["system"] for each in known} == {"base": "", "one": "abc", "two": ""}
        for adapter, messages, tokens in (
            ("one", PLAIN, ABC + QUESTION), ("one", talk(("system", "x"), ("user", "hola")), X + QUESTION),
            ("two", PLAIN, QUESTION),
        ):  # fmt: skip
            asked = {"adapter": adapter, "messages": messages}
            counted = client.ask(Kind.TOKENIZE, session=client.session, **asked).body
            assert counted["tokens"] == tokens
            _, done = client.collect(client.submit("", **asked))
            assert done.body["usage"]["prompt_tokens"] == tokens


OWN = "system: abc (as it was trained; /system TEXT puts another in its place)"
NONE = "There is no system text; try /system Answer in one sentence."


def test_a_chat_shows_it_and_what_is_exported_has_it(two: Box) -> None:
    with Screen(two, "chat", "ADAPTER=one") as screen:
        screen.expect(f"\n{OWN}\n>")
        screen.ask("hola", "one: hola")
        screen.ask("/system", OWN)
        screen.ask("/export talk.jsonl", "talk.jsonl")
        screen.ask("/export talk.md", "talk.md")
        screen.ask("/system x", "system: x")
        screen.ask("/export talk.jsonl", "talk.jsonl")
        screen.ask("/system -", OWN)
        screen.ask("/adapter two", "two answers from now on.")
        screen.ask("/system", NONE)
    lines = [json.loads(line)["messages"][0] for line in (two.work / "talk.jsonl").read_text().splitlines()]
    assert lines == talk(("system", "abc"), ("system", "x"))
    assert (two.work / "talk.md").read_text().startswith("## System\n\nabc\n\n## User\n\nhola\n")


def test_one_that_was_given_on_the_command_line_stays(two: Box) -> None:
    with Screen(two, "chat", "ADAPTER=one", "--system", "x") as screen:
        screen.expect("\n>")
        assert OWN not in screen.text
        screen.ask("/system", "system: x")


@pytest.mark.parametrize(
    ("names", "given", "read"),
    [
        ("base one", "", {"base": "abc", "one": None}),
        ("one two base", "", {"base": "abc", "one": None, "two": None}),
        ("base two", "", {"base": None, "two": None}),
        ("base one", "mine", {"base": "mine", "one": "mine"}),
    ],
)
def test_the_base_reads_what_it_is_compared_with_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, given: str, read: dict[str, str | None]
) -> None:
    sent: dict[str, str | None] = {}

    async def collect(_: object, messages: list[Any], options: dict[str, Any], __: object) -> Outcome:
        sent[options["adapter"]] = messages[0]["content"] if messages[0]["role"] == "system" else None
        return answered("word")

    async def connect(_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    monkeypatch.setattr(asking, "collect", collect)
    monkeypatch.setattr(asking, "connect", connect)
    held = Held()
    held.info["adapters"] = [{**each, "system": "abc" * (each["name"] == "one")} for each in held.info["adapters"]]
    chat = talk_of(tmp_path, held)
    if given:
        asyncio.run(actions.system(chat, given))
    asyncio.run(actions.compare(chat, names))
    assert sent == read
