"""The words of serving: they mean one thing, go round, and a mistake is one line before anything starts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serve import arguments
from serve.arguments import Arguments
from serve.errors import UserError
from serve.settings import Settings
from tests.serve_fixtures import ROOT


def write_run(folder: Path, state: str = "finished") -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"format": 1, "state": state}))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["RUN=runs/x", "HOLD=4bit", "DTYPE=bf16"],
        ["RUN=with space/x y", "NGPU=64", "METRICS=9100"],
        ["RUNS=runs/a runs/b old/c", "LISTEN=[::1]:5555", "serve.slots=3", "serve.memory=0.25", "serve.drain_s=1.5"],
        ["HOLD=echo"],
    ],
)
def test_the_words_go_round(words: list[str]) -> None:
    parsed = arguments.parse("daemon", words)
    assert arguments.parse("daemon", parsed.words()) == parsed


def test_what_the_words_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b")
    several = arguments.parse("daemon", ["RUN=", "RUNS=a  runs/b/", "NGPU=2", "serve.queue=7"])
    assert several == Arguments("runs/a", ("runs/a", "runs/b"), num_gpus=2, settings=Settings(queue=7))
    assert arguments.require_finished(several) == several
    (tmp_path / "runs" / "b" / "run.json").write_text('{"state": "running"}')
    with pytest.raises(UserError, match=r"runs/b is not finished"):
        arguments.require_finished(several)
    assert arguments.require_finished(Arguments()).runs == ("runs/a",)
    (tmp_path / "runs" / "a").rename(tmp_path / "runs" / "base")
    with pytest.raises(UserError, match=r"runs/base: .* rename the folder"):
        arguments.require_finished(Arguments())
    chat = arguments.parse("chat", ["CONNECT=box:5555", "ADAPTER=a@12"])
    assert (chat.connect, chat.adapter, chat.runs) == ("box:5555", "a@12", ())


def test_an_address_is_a_host_and_a_port() -> None:
    assert arguments.split_address("*:80") == ("0.0.0.0", 80)
    assert arguments.split_address("[fe80::1%eth0]:65534") == ("fe80::1%eth0", 65534)
    for bad in ("80", ":80", "a:", "a:0", "a:65535", "::1:80", "a:b", "a b:80", "a:80/x", "a:80\n"):
        with pytest.raises(ValueError, match=re.escape(bad)):
            arguments.split_address(bad)


MISTAKES = {
    "daemon NGPU=65": "try NGPU=1",
    "daemon NGPU=1٣": "try NGPU=1",
    "daemon LISTEN=5555": "try 127.0.0.1:5555",
    "daemon METRICS=0": "try METRICS=9100",
    "daemon METRICS=81 LISTEN=a:80": "try METRICS=79",
    "daemon RUN=a RUNS=b": "RUN and RUNS: say one",
    "daemon RUNS=a,runs/a": "named twice",
    "daemon RUNS=a,old/a": "two runs of that name",
    "daemon RUNS=a,base": "rename the folder",
    "daemon RUN=old/base/": "rename the folder",
    "chat RUN=base": "rename the folder",
    "daemon RUNS=a,b HOLD=merged": "try HOLD=adapters",
    "daemon serve.slot=1": "did you mean slots?",
    "daemon serve.slots=many": "whole number from 0 to 256",
    "daemon CONNECT=a:1": "choose from|did you mean",
    "chat RUNS=a,b": "did you mean RUN?",
    "chat NGPU=2": "try START=yes",
    "chat serve.slots=2": "try START=yes",
    "chat CONNECT=a:1 RUN=x": "try ADAPTER=",
    "chat CONNECT=a:1 START=yes": "try ADAPTER=",
    "infer LISTEN=a:1": "LISTEN=a:1: unknown",
    "status NGPU=1": "Try: make status",
    "keys RUN=x": "Try: make keys",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(line: str) -> None:
    command, *words = (word.replace(",", " ") for word in line.split())
    with pytest.raises(UserError, match=MISTAKES[line].replace("?", r"\?")) as caught:
        arguments.parse(command, words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["serve LISTEN=5555", "chat SET=serve.slot=8", "serve RUN=nowhere", "infer RUNS=a,a"])
def test_make_refuses_before_it_sets_anything_up(tmp_path: Path, words: str) -> None:
    target, word = words.replace(",", " ").split(" ", 1)
    # -I and -S: no site-packages, as on a machine where nothing is set up yet.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", target, word, f"VENV={tmp_path}/venv", f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    # Run by a make, as the whole suite is, it calls itself make[1].
    assert done.stderr.startswith("error: ") and done.stderr.splitlines()[1].startswith("make")
    assert not (tmp_path / "venv").exists()
