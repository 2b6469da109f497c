"""Every command: used well, used wrongly, and during an answer, with the exact words."""

import ast
import asyncio
import functools
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from types import SimpleNamespace

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from serve import errors
from serve.chat import commands, keeping, screen
from serve.chat.actions import ACTIONS
from serve.chat.completion import Words
from serve.chat.conversation_file import ConversationFile
from serve.chat.files import read_file
from serve.chat.phrases import LANGUAGES, PHRASES, hint, language, say
from serve.chat.sampling import NAMES, shown, words
from serve.errors import UserError
from tests.serve_fixtures import Box, Screen, box
from tests.support.paper import Paper, chat_on_paper

__all__ = ["box"]
BLANK = ". With a blank in front it is a question"
NOTHING_ASKED = "error: Nothing was asked yet; try a question first."

ONE_HELD = "talk.jsonl holds 1 conversation, and a training takes 2; export another to the same file"

# What is typed, and the rows that answer it; `#` stands for a number.
TRANSCRIPT = [
    # Wrong before anything was asked.
    ("/undo", [NOTHING_ASKED]),
    ("/regenerate", [NOTHING_ASKED]),
    ("/edit", [NOTHING_ASKED]),
    ("/copy", [NOTHING_ASKED]),
    ("/compare base one", [NOTHING_ASKED]),
    ("/compare", [NOTHING_ASKED]),
    ("/stats", ["There was no answer yet; try a question first."]),
    ("/export talk.md", [NOTHING_ASKED]),
    ("/export talk.jsonl", ["error: no answer that came to its end, so there is nothing to learn; try to ask first"]),
    ("/resume", ["No conversation is kept yet."]),
    ("/resume x", ["error: no conversation is kept yet; try: make chat"]),
    ("/load x", ["error: no conversation is kept yet; try: make chat"]),
    # Nothing behind them, or something that must be there.
    ("/hepl", ["/hepl: unknown command; did you mean /help? Try /help" + BLANK]),
    ("/", ["/: unknown command; choose from: " + ", ".join(commands.COMMANDS) + " Try /help" + BLANK]),
    ("/tmp is full", ["/tmp: unknown command; did you mean /system? Try /help" + BLANK]),
    ("/reset all", ["/reset takes nothing after it; try /reset"]),
    ("/set", ["/set needs name=value ...; try /set temperature=0.7"]),
    ("/save", ["/save needs name; try /save my-talk"]),
    ("/load", ["/load needs name; try /load my-talk"]),
    ("/export", ["/export needs file; try /export talk.md"]),
    ("/file", ["/file needs path; try /file notes.txt"]),
    # Sampling and the system text.
    ("/params", ["Greedy: the likeliest token each time. Try /set temperature=0.7"]),
    ("/set temperature=0.7 seed=1", ["temperature=0.7 seed=1"]),
    ("/set temprature=1", ["error: temprature=1: not name=value; did you mean temperature? Try temperature=0.7"]),
    ("/set top_p=2", ["error: top_p=2: top_p must be a number above 0, at most 1, not '2'; try top_p= to leave it out"]),
    ("/params", ["temperature=0.7 seed=1"]),
    ('/set stop="a b" stop=END', ["temperature=0.7 seed=1 stop='a b' stop=END"]),
    ('/set stop="a b', ['error: a quote is not closed; try stop="a b"']),
    ("/set stop= temperature= seed=", ["Greedy: the likeliest token each time. Try /set temperature=0.7"]),
    ("/system", ["There is no system text; try /system Answer in one sentence."]),
    ("/system Be brief.", ["system: Be brief."]),
    ("/system -", ["There is no system text; try /system Answer in one sentence."]),
    # Turns.
    ("hello", ["hello"]),
    ("/regenerate", ["hello"]),
    ("/edit hello you", ["hello you"]),
    ("/undo", ["Taken back: hello you"]),
    ("again", ["again"]),
    ("/stats", [
        "  prompt_tokens        6", "  reused_tokens        0", "  completion_tokens    5", "  queued_ms            #",
        "  prefill_ms           #", "  decode_ms            #", "  tokens_per_second    #",
    ]),
    # Who answers.
    ("/adapters", ["* base                             none     KL 0", "  one@a065f7f5815c                 echo     KL 7"]),
    ("/adapter", ["runs/echo: echo (echo, none), 2048 tokens; also here: one"]),
    ("/adapter two", ["error: no adapter 'two' is loaded; choose from: base, one"]),
    ("/adapter one", ["one answers from now on."]),
    ("who", ["I say:", "who"]),
    ("/compare base", ["error: /compare takes two or more; try /compare base one"]),
    ("/compare base two", ["error: no adapter 'two' is loaded; choose from: base, one"]),
    ("/compare base one", ["── base", "who", "── one", "I say:", "who", "The answer of one is kept."]),
    ("/compare one one@a065f", ["error: /compare takes two or more; try /compare base one"]),
    ("/adapter one@a065f", ["one@a065f answers from now on."]),
    ("/compare base one", ["── base", "who", "── one", "I say:", "who", "The answer of one is kept."]),
    ("/compare", ["── base", "who", "── one", "I say:", "who", "The answer of one is kept."]),
    ("/adapter one", ["one answers from now on."]),
    # Files.
    ("/file nothing.txt", ["error: nothing.txt: No such file or directory; try the path of a text file"]),
    ("/file ~notes.txt", ["error: ~notes.txt: No such file or directory; try the path of a text file"]),
    ("/file pipe", ["error: pipe: not a regular file; try the path of a text file"]),
    ("/file notes.txt", ["notes.txt goes in front of the next question."]),
    ("what is it?", ["I say:", "", "── notes.txt", "  some notes", "", "what is it?"]),
    ("/copy all", ["error: /copy takes code or nothing; try /copy code"]),
    ("/copy", ["Sent to the terminal's clipboard: 47 characters."]),
    ("/copy code", ["Sent to the terminal's clipboard: 10 characters."]),
    ("/export talk", ["error: talk: ends in neither .md nor .jsonl; try talk.md"]),
    ("/export talk.md", ["written: talk.md"]),
    ("/export talk.md", ["error: talk.md is there already; try another name"]),
    ("/export ~talk.md", ["written: ~talk.md"]),
    ("/export notes.jsonl", ["error: notes.jsonl:1: no conversation for a training; try another name"]),
    ("/export talk.jsonl", [ONE_HELD]),
    ("/export talk.jsonl", [ONE_HELD]),
    # Conversations.
    ("/save my/talk", ["error: 'my/talk' cannot be a name; try up to 60 letters, digits and - _ . with a letter first"]),
    ("/save my-talk", ["This conversation is my-talk now; go on with it: /resume my-talk"]),
    ("/reset", ["The turns are forgotten."]),
    ("/status", ["0 of 8 slots busy, 0 waiting; 0 exchanges in this conversation (my-talk)"]),
    ("fresh", ["I say:", "fresh"]),
    ("/load your-talk", ["error: no conversation your-talk; did you mean my-talk?"]),
    ("/load my-talk", ["1 exchange from my-talk, in a new conversation."]),
    ("/export talk.jsonl", ["talk.jsonl holds 2 conversations; learn from them: make train DATA=talk.jsonl RUN=second"]),
    ("/resume my", ["my-talk: 1 exchange. The last question: fresh"]),
    ("/resume my-talk", ["my-talk is the conversation that is open here: 1 exchange."]),
]  # fmt: skip


def matches(row: str, wanted: str) -> bool:
    return re.fullmatch(re.escape(wanted).replace(r"\#", r"[\d.]+"), row) is not None


def test_every_command_says_exactly_this(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.daemon()
    (box.work / "one").mkdir()
    (box.work / "one" / "prefix").write_text("I say:\n")
    (box.work / "notes.txt").write_text("some notes\n")
    (box.work / "notes.jsonl").write_text("some notes\n")
    os.mkfifo(box.work / "pipe")
    assert box.run("load", "ADAPTER=one").returncode == 0

    async def script(paper: Paper) -> None:
        for typed, wanted in TRANSCRIPT:
            rows = await paper.enter(typed)
            assert len(rows) == len(wanted) and all(map(matches, rows, wanted)), (typed, rows)
        assert any("my-talk" in row.split() for row in await paper.enter("/resume"))
        assert await paper.enter("/edit") == [] and paper.offered == "/edit fresh"
        assert await paper.enter("/help") == commands.help_text(commands.KEYS)

    chat_on_paper(box, monkeypatch, script)
    assert {line.split()[0] for line, _ in TRANSCRIPT if line.startswith("/")} >= set(ACTIONS)
    text = (box.work / "talk.md").read_text()
    assert "## User\n\nagain\n\n## base\n\nagain\n" in text and "(not kept)" in text
    lines = (box.work / "talk.jsonl").read_text().splitlines()
    assert [turn["role"] for turn in json.loads(lines[0])["messages"]] == ["user", "assistant"] * 3
    assert len(lines) == 2 and (box.work / "talk.jsonl").stat().st_mode & 0o777 == 0o600


def test_who_is_alone_cannot_be_compared(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.daemon()

    async def script(paper: Paper) -> None:
        (row,) = await paper.enter("/compare")
        assert row.startswith("error: only base is here; try make load ADAPTER=")

    chat_on_paper(box, monkeypatch, script)


def test_every_command_during_an_answer_waits_for_its_end(box: Box) -> None:
    box.daemon(0.02)
    typed = [name for name in commands.COMMANDS if name not in commands.AT_ONCE]
    lines = {
        **{
            name: f"{name} x" if commands.COMMANDS[name] and not commands.COMMANDS[name].startswith("[") else name
            for name in typed
        },
        "/set": "/set seed=1",
        "/resume": "/resume nothing",
        "/regenerate": "/params",
    }
    with Screen(box, "chat", size=(200, 80)) as screen:
        screen.expect("\n>")
        screen.type("x" * 60 + "y\r")
        screen.expect("answering")
        for name in typed:
            screen.type(f"{lines[name]}\r")
        screen.expect("lines wait")
        screen.expect("exchanges in this conversation", 20)
        rows = screen.rows
        end = next(i for i, row in enumerate(rows) if row.endswith("xy") and not row.startswith(">"))
        echoed = [rows.index(f"> {line}") for line in set(lines.values())]
        # What was typed is seen at once, and done when the answer is over.
        assert max(echoed) < end < len(rows) - len(typed) // 2


def test_the_help_names_every_command_and_key() -> None:
    text = "\n".join(commands.help_text(commands.KEYS))
    assert all(name in text for name in (*commands.COMMANDS, *commands.KEYS))
    assert set(ACTIONS) | set(commands.AT_ONCE) == set(commands.COMMANDS)


@pytest.mark.parametrize("line", ["/home/me is full", " /help", "see /help", "/2 is what?", "//"])
def test_what_only_looks_like_a_command_is_a_question(line: str) -> None:
    assert commands.parse(line).prompt == line


def fields(text: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in Formatter().parse(text) if name is not None)


def calls() -> Iterator[ast.Call]:
    """Every call in the source of the chat."""
    for path in Path("serve/chat").glob("*.py"):
        yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def test_both_languages_say_everything_with_the_same_values() -> None:
    for phrase, texts in PHRASES.items():
        assert len(texts) == len(LANGUAGES) and all(texts), phrase
        assert len({fields(text) for text in texts}) == 1, phrase
    source = "".join(path.read_text() for path in Path("serve/chat").glob("*.py") if path.name != "phrases.py")
    source += inspect.getsource(hint)
    unsaid = [
        phrase
        for phrase in PHRASES
        if not re.search(f"[\"']{re.escape(phrase)}[\"']", source) and phrase not in commands.KEYS
    ]
    assert not unsaid


def test_every_phrase_is_said_with_its_values() -> None:
    num_said = 0
    for call in calls():
        if called(call) in ("say", "tell") and isinstance(call.args[0], ast.Constant):
            phrase, given = call.args[0].value, {keyword.arg for keyword in call.keywords}
            assert given == fields(PHRASES[phrase][0]), phrase
            num_said += 1
    assert num_said > len(PHRASES) // 2


def test_what_is_wrong_is_said_in_the_users_language() -> None:
    faults = [call for call in calls() if called(call).endswith("Error") and called(call) in vars(errors)]
    assert len(faults) > 30
    # `say(...)`, what a daemon or the system said, or what is made of these elsewhere: never a text that stands here.
    literal = [ast.unparse(call) for call in faults if not isinstance(call.args[0], ast.Call)]
    assert not literal


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"AFINAR_LANG": "es", "LANG": "en_US.UTF-8"}, "es"),
        ({"LANG": "es_MX.UTF-8"}, "es"),
        ({"LC_ALL": "C", "LANG": "es_MX.UTF-8"}, "en"),
        ({"LC_MESSAGES": "es_ES", "LANG": "en_US"}, "es"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({}, "en"),
    ],
)
def test_the_language_is_asked_for_or_of_the_locale(environment: dict[str, str], wanted: str) -> None:
    assert language(environment) == wanted


def test_one_is_not_several_in_either_language(monkeypatch: pytest.MonkeyPatch) -> None:
    for lang, wanted in (("en", ("1 exchange", "2 exchanges")), ("es", ("1 intercambio", "2 intercambios"))):
        monkeypatch.setenv("AFINAR_LANG", lang)
        assert (say("exchanges", number=1), say("exchanges", number=2)) == wanted
    for phrase, texts in PHRASES.items():
        assert len({text.count("|") for text in texts}) == 1, phrase
        # A count of things has a form for one of them.
        assert "{number}" not in texts[0] or "|" in texts[0] or phrase in ("queued", "far_too_long"), phrase


# As `TRANSCRIPT`, in the other language: what can be wrong.
SPANISH = [
    ("/hepl", ["/hepl: comando desconocido; ¿quisiste decir /help? Prueba /help. Con un espacio delante es una pregunta"]),
    ("/undo", ["error: Aún no se ha preguntado nada; prueba con una pregunta."]),
    ("/resume x", ["error: aún no hay conversaciones guardadas; prueba: make chat"]),
    ("/export talk.jsonl", [
        "error: ninguna respuesta llegó a su fin, así que no hay nada que aprender; prueba a preguntar primero",
    ]),
    ("/set temprature=1", [
        "error: temprature=1: no es nombre=valor; ¿quisiste decir temperature? Prueba temperature=0.7",
    ]),
    ("/set x=1", [f"error: x=1: no es nombre=valor; elige entre: {', '.join(NAMES)} Prueba temperature=0.7"]),
    # The rule is the daemon's, and comes in its words.
    ("/set top_p=2", [
        "error: top_p=2: top_p must be a number above 0, at most 1, not '2'; prueba top_p= para quitarlo",
    ]),
    ('/set stop="a b', ['error: falta cerrar unas comillas; prueba stop="a b"']),
    ("/file pipe", ["error: pipe: no es un archivo normal; prueba la ruta de un archivo de texto"]),
    ("/file latin", ["error: latin: no es UTF-8 (byte 0); prueba: iconv -t utf-8"]),
    ("/file large", ["error: large: más de 1 MiB; prueba una parte: head -c 100000 large"]),
    # The cause is the system's, in its words.
    ("/file nothing", ["error: nothing: No such file or directory; prueba la ruta de un archivo de texto"]),
    ("hola", ["hola"]),
    ("/export nowhere/talk.md", ["error: nowhere/talk.md: No such file or directory; prueba otra ruta"]),
    ("/save my/talk", [
        "error: 'my/talk' no puede ser un nombre; prueba hasta 60 letras, cifras y - _ . con una letra al principio",
    ]),
    ("/save damaged", ["error: damaged ya existe; prueba otro nombre"]),
    ("/load damaged", [
        "error: {folder}/damaged.jsonl:2: dañado (not an event); "
        "prueba: head -n 1 {folder}/damaged.jsonl > {folder}/damaged-cut.jsonl, y continúa damaged-cut",
    ]),
    ("/load newer", ["error: {folder}/newer.jsonl:1: format 2, de un Afinar más nuevo; prueba a actualizar este"]),
    ("/resume other", ["error: {folder}/other.jsonl:1: no es el comienzo de una conversación; prueba otra"]),
    ("/load xyz", ["error: no hay ninguna conversación xyz; elige entre: {names}"]),
]  # fmt: skip


def test_what_is_wrong_is_said_in_spanish(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.daemon()
    os.mkfifo(box.work / "pipe")
    (box.work / "latin").write_bytes(b"\xe9t\xe9")
    (box.work / "large").write_bytes(b"x" * (2**20 + 1))
    folder = box.folder / ".local/state/afinar/conversations"

    async def script(paper: Paper) -> None:
        names = ""
        for typed, wanted in SPANISH:
            if typed == "/save damaged":
                (begun,) = folder.glob("*.jsonl")
                (folder / "other.jsonl").write_text("{}\n")
                (folder / "newer.jsonl").write_text('{"kind": "conversation", "format": 2}\n')
                (folder / "damaged.jsonl").write_text('{"kind": "conversation", "format": 1}\n3\n')
                for age, name in enumerate((begun.stem, "damaged", "newer", "other")):
                    os.utime(folder / f"{name}.jsonl", (2e9 - age, 2e9 - age))
                names = f"{begun.stem}, damaged, newer, other"
            values = {"{folder}": str(folder), "{names}": names}
            assert await paper.enter(typed) == [
                functools.reduce(lambda row, name: row.replace(name, values[name]), values, row) for row in wanted
            ]

    monkeypatch.setenv("AFINAR_LANG", "es")
    chat_on_paper(box, monkeypatch, script)


def test_every_sampling_parameter_is_completed() -> None:
    words = Words(lambda: [], lambda: [])
    found = [each.text for each in words.get_completions(Document("/set "), CompleteEvent())]
    assert found == [f"{name}=" for name in NAMES] and "deadline_ms=" in found
    # No path has a NUL in it, and to look for one is an error.
    assert not list(words.get_completions(Document("/file a\0"), CompleteEvent()))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('stop="a b" seed=1', ["stop=a b", "seed=1"]),
        ("stop='\"' stop=#", ['stop="', "stop=#"]),
        (r"stop=\n", [r"stop=\n"]),
        ("stop='a\nb'", ["stop=a\nb"]),
    ],
)
def test_words_of_sampling(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted
    assert words(shown({"stop": [word.partition("=")[2] for word in wanted]})) == [
        f"stop={word.partition('=')[2]}" for word in wanted
    ]


def test_conversations_that_cannot_be_read(tmp_path: Path) -> None:
    # A folder, since root can read anything else.
    (tmp_path / "bad.jsonl").mkdir()
    for action in (keeping.load, keeping.resume):
        talk = SimpleNamespace(file=ConversationFile(tmp_path))
        with pytest.raises(UserError, match=r"bad.jsonl: Is a directory; try another conversation"):
            asyncio.run(action(talk, "bad"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a\0b", "~/a\0"])
def test_no_path_has_a_nul(name: str) -> None:
    with pytest.raises(UserError, match="no path has a NUL"):
        read_file(name)
    with pytest.raises(UserError, match="no path has a NUL"):
        asyncio.run(keeping.export_to(SimpleNamespace(), name))  # type: ignore[arg-type]


def test_a_list_has_a_row_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert screen.clipped("one 漢字漢字漢字漢字漢字") == "one 漢字漢字漢字漢"
    assert screen.clipped("\x1b[2J") == "\\x1b[2J"
