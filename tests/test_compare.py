"""Runs side by side, from run folders written by hand."""

import json
import math
import subprocess
import sys

import pytest

from launcher import compare, plots
from launcher.__main__ import main
from launcher.compose import load
from launcher.variables import ROOT, parse
from tests.running import launch_in_turn, run_python

STEPS = 40
TOKENS = 1000


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def falling(step, rate):
    """A loss of the usual shape, with the noise of the batches."""
    return 3 * math.exp(-rate * step) + 0.02 + 0.15 * math.sin(7 * step) * math.exp(-rate * step)


def evaluation(step, rate, examples):
    loss = falling(step, rate)
    found = {"step": step, "loss": loss, "perplexity": math.exp(loss), "examples": examples}
    return {**found, "answers": 8, "exact_match": 0.875}


def a_run(folder, *words, done=STEPS, state="finished", rate=0.1, data="one", base="f00"):
    """Write a run folder that is as far as `done` of its 40 steps."""
    config = load(parse(["data.limit=640", *words, f"RUN={folder}"]))
    folder.mkdir(parents=True)
    manifest = {
        "format": 3,
        "state": state,
        "command": "make train",
        "config": config.model_dump(mode="json"),
        "base": {"name": config.model.name, "digest": base},
        "data": data,
        "training": {
            "steps": STEPS, "train_examples": 640, "held_out_examples": 200, "trained_parameters": 4884480,
        },
    }  # fmt: skip
    if state == "finished":
        manifest["results"] = {**evaluation(done, rate, 200), "wall_s": 490.3}
    (folder / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    steps = [{"step": n, "loss": falling(n, rate), "tokens": TOKENS, "step_s": 1.5} for n in range(1, done + 1)]
    write_lines(folder / "metrics.jsonl", steps)
    write_lines(folder / "evaluations.jsonl", [evaluation(n, rate, 40) for n in range(0, done + 1, 10)])
    return folder


def a_measurement(run, exact_match):
    tuned = {"loss": 0.0753, "perplexity": 1.0782, "exact_match": exact_match, "samples": [{}] * 200}
    (run / "eval.json").write_text(json.dumps({"tuned": tuned}))


@pytest.fixture
def compared(capsys):
    """What the command says of some runs; it says nothing on stderr."""

    def told(*runs):
        assert main(["compare", f"RUNS={' '.join(map(str, runs))}"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return told


def row(out, name):
    return next(line.strip() for line in out.splitlines() if line.split()[:1] == [name])


def test_each_run_is_a_row_and_the_picture_lies_beside_them(tmp_path, compared):
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other", "PEFT=qlora", rate=0.05)
    a_measurement(one, 0.965)
    done = run_python("-m", "launcher", "compare", f"RUNS={one} {other}", light=True)
    assert (done.returncode, done.stderr) == (0, "")
    out = done.stdout
    told = " ".join(row(out, "one").split())
    assert told == "one lora smollm2-135m 4,884,480 640 x 1 40,000 0:08:10 0.0739 1.077 96.5% of 200"
    assert row(out, "other").split()[1:4] == ["qlora", "smollm2-135m", "4,884,480"]
    # Not measured by `make eval`, so from the end of the training.
    assert row(out, "other").endswith("87.5% of 8")
    assert "warning" not in out
    assert "note" not in out
    assert out.splitlines()[-1] == f"drawn to {tmp_path}/compare-one-other.png. Next: make eval RUN={other}"
    assert (tmp_path / "compare-one-other.png").read_bytes()[:4] == b"\x89PNG"
    a_measurement(other, None)
    out = compared(one, other)
    assert row(out, "other").endswith("—")
    assert out.endswith(f"Next: make chat RUN={one}\n")


def test_an_unfinished_run_shows_what_there_is(tmp_path, compared):
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other", state="stopped", done=25)
    out = compared(one, other)
    assert "stopped, step 25/40" in out
    assert row(out, "other").split()[3:8] == ["4,884,480", "640", "x", "1", "25,000"]
    assert row(out, "other").split()[8] == "0:00:38"
    assert "note: other is measured on 40 of its 200 held-out examples, at step 20" in out
    # Before its first evaluation, and with a line that is being written.
    (other / "evaluations.jsonl").unlink()
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "lo')
    out = compared(other, one)
    assert row(out, "other").split()[-3:] == ["—", "—", "—"]
    assert (tmp_path / "compare-other-one.png").exists()


def test_two_unfinished_runs_are_to_be_looked_at_again(tmp_path, compared):
    runs = [a_run(tmp_path / name, "optim.max_steps=40", state="running", done=1) for name in ("one", "other")]
    out = compared(*runs)
    assert "40 steps of 8" in row(out, "one")
    assert "running, step 1/40" in out
    assert out.endswith("Next: the same again, once they have gone on\n")


def test_a_resumed_run_took_longer_than_its_last_attempt(tmp_path, compared):
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other")
    manifest = json.loads((one / "run.json").read_text())
    manifest["results"]["wall_s"] = 12.0
    (one / "run.json").write_text(json.dumps(manifest))
    assert "0:01:00" in row(compared(one, other), "one")


def test_a_narrow_terminal_gets_a_column_a_run(tmp_path, capsys):
    from rich.console import Console

    runs = compare.read_runs([a_run(tmp_path / "one"), a_run(tmp_path / "other", state="stopped", done=25)])
    compare.show(Console(width=80, markup=False, highlight=False), runs)
    out = capsys.readouterr().out
    assert row(out, "method").split() == ["method", "lora", "lora"]
    assert row(out, "tokens").split() == ["tokens", "seen", "40,000", "25,000"]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "change", "told"),
    [
        (["DATA={jsonl}"], {"data": "two"}, "warning: not the same data (data.source: cafe, {jsonl}), so their losses"),
        ([], {"data": "two"}, "warning: not the same data (it changed in between), so their losses"),
        (["data.limit=64"], {"data": "two"}, "warning: not as much data (data.limit: 640, 64): compare the held-out"),
        (["MODEL=gpt-2"], {"base": "bad"}, "warning: not the same base (smollm2-135m, gpt-2), so their losses"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path, words, change, told, compared):
    jsonl = tmp_path / "orders.jsonl"
    jsonl.write_text("{}\n")
    one = a_run(tmp_path / "one")
    other = a_run(tmp_path / "other", *(word.format(jsonl=jsonl) for word in words), **change)
    out = compared(one, other)
    assert told.format(jsonl=jsonl) in out
    assert out.count("warning") == 1


def test_names_are_told_apart_and_their_picture_has_a_plain_name(tmp_path, capsys):
    one, other = a_run(tmp_path / "a" / "my run"), a_run(tmp_path / "b" / "my run")
    assert main(["compare", f"RUN={one}", f"RUN={other}"]) == 0
    assert str(one) in capsys.readouterr().out
    assert (tmp_path / "a" / "compare-my-run-my-run.png").exists()


def test_the_curves_lie_over_the_tokens_of_their_steps(tmp_path):
    run = compare.read_runs([a_run(tmp_path / "one", done=25)])[0]
    assert [run.tokens[step] for step in (0, 1, 25)] == [0, TOKENS, 25 * TOKENS]
    assert plots.smooth([1.0, 2.0]) == [1.0, 2.0]
    assert plots.smooth([0.0, 3.0] * 20)[:3] == [1.0, 1.5, 1.2]


BAD = {
    ("RUNS={there}/one",): "a comparison takes two different runs or more",
    ("RUNS={there}/one {there}/./one",): "a comparison takes two different runs or more",
    ("RUNS=",): "a comparison takes two different runs or more",
    (): "a comparison takes two different runs or more",
    ("RUNS={there}/one {there}/othr",): "{there}/othr: no such run; did you mean other?",
    ("RUNS={there}/one {there}/quite",): "no such run; choose from: empty, old, one, other, torn",
    ("RUNS={there}/one {there}/nowhere/one",): "no such run; try: make train",
    ("RUNS={there}/one {there}/empty",): "empty: no step done yet (running); try again after its first",
    ("RUNS={there}/one {there}/old",): "format 1, this version reads 3; train again",
    ("RUNS={there}/one {there}/torn",): "eval.json: damaged; try: rm",
    ("RUN={there}/one", "RUN=a;b"): "try RUN=my-run",
    ("RUNSS=a b",): "did you mean RUNS?",
    ("one",): 'one: runs are named by a variable; try RUNS="one"',
}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "other", "old", "torn"):
        a_run(folder / name)
    a_run(folder / "empty", done=0, state="running")
    (folder / "old" / "run.json").write_text('{"format": 1}')
    (folder / "torn" / "eval.json").write_text('{"tuned"')
    return folder


@pytest.fixture(scope="module")
def told(there):
    """What is said of each of BAD, and of a line with three faults."""
    lines = [[word.format(there=there) for word in words] for words in BAD]
    three = [f"RUNS={there}/none {there}/othr {there}/empty"]
    return dict(zip([*BAD, "three"], launch_in_turn([["compare", *line] for line in [*lines, three]]), strict=True))


@pytest.mark.parametrize("words", BAD, ids=lambda words: " ".join(words) or "nothing")
def test_bad_input_is_one_line_that_says_what_to_try(there, told, words):
    # What is imported is checked in the very process: a module that is never loaded cannot be slow.
    code, out, err, loaded = told[words]
    assert (code, out, loaded) == (2, "", [])
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert BAD[words].format(there=there) in line
    assert not list(there.glob("*.png"))


def test_every_fault_is_told_at_once(told):
    assert told["three"].code == 2
    assert len(told["three"].err.splitlines()) == 3


def test_make_refuses_before_it_sets_anything_up(tmp_path):
    done = subprocess.run(
        ["make", "compare", "RUNS=alone", f"VENV={tmp_path}/venv", f"PYTHON={sys.executable}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert 'error: RUNS="alone"' in done.stderr
    assert not (tmp_path / "venv").exists()
