"""The flags of `chat` and `infer`: both forms, any order, and a mistake is one line that says what to try."""

import subprocess
import sys

import pytest

from serve import __main__ as program
from serve import arguments
from serve.errors import UserError
from tests.serve_fixtures import ROOT


def test_flags_and_words_come_in_any_order() -> None:
    flags = ["--json", "--system=a b", "--adapter", "base", "--set", "top_k=3", "--file", "x", "--file=y"]
    words = ["RUN=runs/x", "START=yes"]
    parsed = arguments.parse("chat", [*flags, *words])
    assert (parsed.is_json, parsed.system, parsed.adapter) == (True, "a b", "base")
    assert (parsed.sampling, parsed.files, parsed.start) == ({"top_k": 3}, ("x", "y"), True)
    assert parsed == arguments.parse("chat", [*words, *flags])
    assert parsed == arguments.parse("chat", [*flags[:4], words[0], *flags[4:], words[1]])


def test_flags_are_for_infer_too_and_for_nobody_else() -> None:
    assert arguments.parse("infer", ["--system", "s"]).system == "s"
    with pytest.raises(UserError, match=r"^--json: unknown; choose from: RUN, CONNECT Try: make status$"):
        arguments.parse("status", ["--json"])


def test_a_daemon_that_is_started_hears_nothing_of_them() -> None:
    words = arguments.parse("infer", ["RUN=x", "--system", "s", "--json", "--set", "seed=1"]).words()
    assert words == arguments.parse("infer", ["RUN=x"]).words()


def test_sampling_has_types() -> None:
    words = ["temperature=0.5", "top_k=3", "top_p=1", "max_tokens=9", "seed=7", "stop=a", "stop=2", "deadline_ms=50"]
    flags = [word for each in words for word in ("--set", each)]
    assert arguments.parse("chat", flags).sampling == {
        **{"temperature": 0.5, "top_k": 3, "top_p": 1, "max_tokens": 9, "seed": 7, "deadline_ms": 50},
        "stop": ["a", "2"],
    }


MISTAKES = {
    ("--jsn",): "^--jsn: unknown; did you mean --json? Try: python -m serve chat --help$",
    ("-q",): "^-q: unknown; choose from: --json, ",
    ("--json=yes",): "^--json=yes: takes no value; try --json$",
    ("--system",): "^--system: TEXT must follow; try --system ",
    ("--file", "--json"): "^--file: PATH must follow; try --file notes.txt$",
    ("--system", "a\udcff"): "^--system: not UTF-8; try --system ",
    ("--set", "stop=\udcff"): "^--set: not UTF-8; try --set ",
    ("--adapter", "\udcff"): "not UTF-8; try make status",
    ("--set", "temprature=1"): "did you mean temperature?",
    ("--set", "temperature"): "not name=value",
    ("--set", "temperature=101"): "a number from 0 to 100, not '101'; try",
    ("--set", "temperature=nan"): "a number from 0 to 100, not 'nan'; try",
    ("--set", "temperature=true"): "a number from 0 to 100, not 'True'; try",
    ("--set", "top_k=1.5"): "top_k must be a whole number",
    ("--set", "top_p=0"): "top_p must be a number above 0",
    ("--set", "min_p=-1"): "min_p must be a number from 0 to 1",
    ("--set", "repetition_penalty=0"): "repetition_penalty must be a number from 0.01",
    ("--set", "max_tokens=0"): "max_tokens must be a whole number above 0",
    ("--set", f"seed={2**63}"): "seed must be a whole number below",
    ("--set", f"stop={'x' * 257}"): "stop must be at most 16 strings of 1 to 256",
    ("--set", "deadline_ms=0"): "deadline_ms must be a whole number of milliseconds",
}


@pytest.mark.parametrize("words", MISTAKES, ids=[" ".join(words)[:30] for words in MISTAKES])
def test_a_mistake_is_one_line(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=MISTAKES[words].replace("?", r"\?")) as caught:
        arguments.parse("chat", list(words))
    assert "\n" not in str(caught.value)


SPANISH = {
    ("--jsno",): "--jsno: desconocido; ¿quisiste decir --json? Prueba: python -m serve chat --help",
    ("--file",): "--file: falta PATH detrás; prueba --file notes.txt",
    ("--json=yes",): "--json=yes: no lleva valor; prueba --json",
    ("--system", "\udce9"): '--system: no es UTF-8; prueba --system "Answer in one sentence."',
    ("--set", "stop"): "stop: no es nombre=valor; ¿quisiste decir stop? Prueba temperature=0.7",
}


@pytest.mark.parametrize("words", SPANISH, ids=[ascii(words) for words in SPANISH])
def test_a_mistake_is_told_in_the_users_language(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINAR_LANG", "es")
    with pytest.raises(UserError) as caught:
        arguments.parse("chat", list(words))
    assert str(caught.value) == SPANISH[words]


def test_help_shows_every_flag_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["chat", "RUN=x", "--help"]) == 0
    text = capsys.readouterr().out
    for wanted in ("--json", "--system TEXT", "--adapter NAME", "--set name=value", "--file PATH", "min_p", "START"):
        assert wanted in text
    assert "| python -m serve chat" in text
    assert program.main(["infer", "-h"]) == 0 and "METRICS" in capsys.readouterr().out
    assert program.main(["status", "--help"]) == 0 and "look after the daemon" in capsys.readouterr().out


def test_they_are_checked_with_the_standard_library_alone() -> None:
    # -S: no site-packages, as on a machine where nothing is set up yet.
    words = ["--system", "a", "--json", "--adapter=b", "--file", "c"]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "serve.arguments", "chat", *words, "--fiel"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --fiel: unknown; did you mean --file? Try: python -m serve chat --help\n"


def test_make_passes_the_system_text_through() -> None:
    done = subprocess.run(
        ["make", "-n", "chat", 'SYSTEM=it\'s "brief"', "VENV=/nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "SYSTEM": "nobody's"},
    )
    (line,) = (line for line in done.stdout.splitlines() if "-m serve chat" in line)
    assert line.endswith("""--system='it'\\''s "brief"'""")
