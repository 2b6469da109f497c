"""Real data that people wrote: downloaded, converted, read and learned from."""

from collections import Counter

import pytest

from bench import chatterbot
from launcher import data
from launcher.config import Data
from launcher.report import read_evaluations
from tests.running import run_python


@pytest.mark.slow
def test_a_real_corpus_is_read_and_learned(tiny_llama, tmp_path):
    out, run = tmp_path / "chatterbot.jsonl", tmp_path / "run"
    done = run_python("-m", "bench.chatterbot", str(out))
    assert done.returncode == 0, done.stderr
    assert f"make train DATA={out}" in done.stdout
    assert "1 left out: no list of turns" in done.stdout

    splits = data.read(Data(source=str(out)))
    conversations = splits.train + splits.held_out
    assert len(conversations) > 500
    assert not [messages for messages in splits.held_out if messages in splits.train]
    words = {m["content"] for messages in conversations for m in messages}
    assert {"What is AI?", "Buenos días, ¿cómo estás?"} <= words

    # The longest are longer than the tiny model's context.
    options = ["data.overflow=drop", "data.max_length=256", "model.dtype=fp32", "optim.lr=1e-2", "batch.size=8"]
    steps = ["optim.max_steps=40", "eval.examples=16", "eval.answers=0"]
    done = run_python("-m", "launcher", "train", f"MODEL={tiny_llama}", f"DATA={out}", f"RUN={run}", *options, *steps)
    assert done.returncode == 0, done.stderr
    first, *_, last = read_evaluations(run)
    assert last["loss"] < 0.85 * first["loss"]


@pytest.mark.parametrize(
    ("dialogue", "fault"),
    [
        ("a - b", "left out: no list of turns"),
        (["a", None], "left out: a turn that is empty or no text"),
        (["a", 22], "left out: a turn that is empty or no text"),
        (["a", " "], "left out: a turn that is empty or no text"),
        (["a"], "left out: fewer than two turns"),
        (["hi", "hello"], "left out: the same as another"),
        (["hi ", "hello\n", "bye"], "left out: the same as another"),
    ],
)
def test_what_is_no_use_is_counted(dialogue, fault):
    seen, faults = set(), Counter()
    assert chatterbot.convert(["hi", "hello"], seen, faults)
    assert chatterbot.convert(dialogue, seen, faults) is None
    assert faults[fault] == 1


def test_an_unanswered_last_turn_is_cut_off():
    faults = Counter()
    line = chatterbot.convert(["hi", "hello", "¿sí?"], set(), faults)
    assert line == '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}'
    assert faults[chatterbot.UNANSWERED] == 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "try: python -m bench.chatterbot chatterbot.jsonl"),
        (["{folder}/out.txt"], "try {folder}/out.jsonl"),
        (["{folder}/none/out.jsonl"], "no such folder; try out.jsonl"),
        (["{folder}/there.jsonl"], "exists; try another name"),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_downloaded(tmp_path, args, told):
    (tmp_path / "there.jsonl").touch()
    words = [arg.format(folder=tmp_path) for arg in args]
    # Without a package index nothing but the check can answer.
    done = run_python("-m", "bench.chatterbot", *words, env={"PIP_INDEX_URL": "http://127.0.0.1:9"}, light=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert told.format(folder=tmp_path) in line


@pytest.mark.slow
def test_an_unknown_language_and_a_missing_index_are_said(tmp_path):
    out = str(tmp_path / "out.jsonl")
    done = run_python("-m", "bench.chatterbot", out, "spanisch")
    assert done.returncode == 2
    assert done.stderr == "error: spanisch: no such language; did you mean spanish?\n"
    nowhere = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0"}
    done = run_python("-m", "bench.chatterbot", out, env={**nowhere, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""})
    assert done.returncode == 2
    assert "check the network and try again" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
