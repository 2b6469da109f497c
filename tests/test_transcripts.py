"""Five whole conversations at a real pseudo-terminal, row by row; what every command says is read on paper (test_commands)."""

import json
import time
from pathlib import Path

import pytest

from tests.serve_fixtures import PATIENCE, Box, Screen, box

__all__ = ["box"]
LEAVE = "\x04"
GREETING = "runs/echo: echo (echo, none), 2048 tokens{}. /help shows the commands, Ctrl-D leaves."


def play(screen: Screen, greeting: str, *transcript: tuple[str, list[str]]) -> None:
    """Enter each line when all rows of the one before are there; then leave. Nothing else is said."""
    rows = [greeting]
    screen.expect("\n>")
    assert screen.said == rows
    for typed, wanted in transcript:
        screen.type(f"{typed}\r")
        rows += [f"> {typed}", *wanted]
        end = time.monotonic() + PATIENCE
        while screen.said != rows and time.monotonic() < end and screen.read(0.1):
            pass
        assert screen.said == rows
    screen.expect("\n>")
    screen.type(LEAVE)
    assert screen.wait() == 0
    assert [row for row in screen.rows[len(rows) :] if row != ">"] == [], "more was said"


def load(box: Box, name: str) -> str:
    """Give the daemon an adapter that begins every answer with its name; `name@digest`."""
    (box.work / name).mkdir()
    (box.work / name / "prefix").write_text(f"{name} says: ")
    done = box.run("load", f"ADAPTER={name}")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


def kinds(box: Box) -> list[str]:
    """What happened in the only conversation that is kept."""
    (path,) = Path(box.folder / ".local/state/afinar/conversations").glob("*.jsonl")
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()]


def test_english(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat", size=(110, 30)) as screen:
        play(
            screen,
            GREETING.format(""),
            ("/sett", ["/sett: unknown command; did you mean /set? Try /help. With a blank in front it is a question"]),
            ("hola ñ", ["hola ñ"]),
            ("/save mine", ["This conversation is mine now; go on with it: /resume mine"]),
            ("/set temperature=0.7", ["temperature=0.7"]),
            ("/status", ["0 of 8 slots busy, 0 waiting; 1 exchange in this conversation (mine)"]),
        )
    assert kinds(box) == ["conversation", "begin", "user", "answer", "params"]


def test_spanish(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat", AFINAR_LANG="es") as screen:
        play(
            screen,
            "runs/echo: echo (echo, none), 2048 tokens. /help muestra los comandos, Ctrl-D sale.",
            ("/undo", ["error: Aún no se ha preguntado nada; prueba con una pregunta."]),
            ("¿qué?", ["¿qué?"]),
            ("/undo", ["Deshecho: ¿qué?"]),
        )


@pytest.mark.parametrize("variable", ["TERM=dumb", "NO_COLOR=1"])
def test_a_terminal_that_cannot_draw(box: Box, variable: str) -> None:
    box.daemon()
    name, _, value = variable.partition("=")
    with Screen(box, "chat", **{name: value}) as screen:
        play(screen, GREETING.format(""), ("**hola**", ["**hola**"]), ("/undo", ["Taken back: **hola**"]))
        assert b"\x1b" not in screen.raw


@pytest.mark.parametrize("command", ["load", "resume"])
def test_a_conversation_goes_on_although_its_adapter_is_gone(box: Box, command: str) -> None:
    box.daemon()
    key = load(box, "one")[: len("one@1234")]
    with Screen(box, "chat") as screen:
        play(
            screen,
            GREETING.format("; also here: one"),
            (f"/adapter {key}", [f"{key} answers from now on."]),
            ("hello", ["one says: hello"]),
            ("/save mine", ["This conversation is mine now; go on with it: /resume mine"]),
        )
    assert box.run("unload", "ADAPTER=one").returncode == 0
    said = {
        "load": "1 exchange from mine, in a new conversation.",
        "resume": "mine: 1 exchange. The last question: hello",
    }
    with Screen(box, "chat") as screen:
        play(
            screen,
            GREETING.format(""),
            (f"/{command} mine", [f"{key} is not here; base answers from now on.", said[command]]),
            ("next", ["next"]),
        )


def test_two_answers_side_by_side(box: Box) -> None:
    box.daemon()
    load(box, "one")
    with Screen(box, "chat") as screen:
        both = ["── base", "who?", "── one", "one says: who?"]
        play(
            screen,
            GREETING.format("; also here: one"),
            ("who?", ["who?"]),
            ("/compare base one", [*both, "The answer of base is kept."]),
            ("/adapter one", ["one answers from now on."]),
            ("/compare", [*both, "The answer of one is kept."]),
        )
    assert kinds(box).count("others") == 2
