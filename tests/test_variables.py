"""Bad input: exit 2, one line with the nearest valid name, quickly, with nothing heavy imported."""

import subprocess
import sys

import pytest

from launcher.errors import UserError
from launcher.variables import ROOT, parse
from tests.running import launch_in_turn, run_python

BAD = {
    "PEFT=lorra": "did you mean lora?",
    "MODEL=llama7b": "did you mean llama-7b?",
    "MODEL=./nowhere": "no such folder",
    "optim.lrr=1": "did you mean optim.lr?",
    "optim.lr=fast": "optim.lr=fast: input should be a valid number",
    "NGPU=0": "try NGPU=1",
    "NGPU=two": "try NGPU=1",
    "DATA=/nope.jsonl": "try DATA=cafe",
    "DATA=cofe": "did you mean cafe?",
    "DATA=data/orders.csv": "no such file; try DATA=cafe or a .jsonl",
    "DATA=tests": "no .txt or .md file in this folder; try DATA=cafe",
    "data.split=test": "data.split: cafe is not a hub dataset; try without it",
    "STRATEGY=zero": "did you mean zero3?",
    "HARDWARE=4": "try HARDWARE=4x24GB",
    "HARDWARE=4x24GB": "make plan",
    "PROBE=perhaps": "try PROBE=yes",
    "NNODES=2": "try MASTER_ADDR=",
    "NODE_RANK=1": "there is one machine only",
    "NNODES=2 MASTER_ADDR=a NODE_RANK=2": "try NODE_RANK=1",
    "MASTER_PORT=80": "try MASTER_PORT=29600",
    "STRATEGY=ddp": "try STRATEGY=single",
    "STRATEGY=single NGPU=2": "try STRATEGY=zero2",
    "RUN=a;b": "try RUN=my-run",
    "RUN=~/a/b": "~; try RUN=$HOME/a/b",
    "RUN=runs/base": "base is the model without an adapter; try RUN=my-run",
    "PEFTT=lora": "did you mean PEFT?",
    "batch.size=15 NGPU=2": "try batch.size=14",
    "PEFT=qlora NGPU=4": "make train PEFT=lora NGPU=4",
    "MODEL=llama-7b": "export HUGGINGFACE_TOKEN",
}


@pytest.fixture(scope="module")
def told():
    """What is said of each of BAD."""
    lines = [["train", *args.split()] for args in BAD]
    return dict(zip(BAD, launch_in_turn(lines, {"HUGGINGFACE_TOKEN": "", "HF_TOKEN": ""}), strict=True))


@pytest.mark.parametrize("args", BAD)
def test_bad_input_is_one_line_that_says_what_to_try(told, args):
    # What is imported is checked in the very process: a module that is never loaded cannot be slow.
    code, out, err, loaded = told[args]
    assert (code, out, loaded) == (2, "", [])
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert BAD[args] in line


def test_all_faults_are_told_at_once():
    with pytest.raises(UserError) as error:
        parse(["PEFT=lorra", "NGPU=0", "DATA=/nope.jsonl"])
    assert len(error.value.faults) == 3


def test_the_check_needs_nothing_but_the_standard_library():
    # -I and -S: no site-packages, as on a machine where nothing is set up yet.
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launcher.variables import main; main(['PEFT=lora'])"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)


@pytest.mark.parametrize("words", [["train", "PEFT=lorra"], ["train", "SET=optim.lrr=1"], ["chat", "HOLD=mergd"]])
@pytest.mark.parametrize("jobs", [[], ["-j4"]], ids=["one by one", "at once"])
def test_make_refuses_before_it_sets_anything_up(tmp_path, words, jobs):
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\necho "$1 $2" >> {calls}\n[ "$2" != venv ] && exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", *jobs, *words, f"VENV={tmp_path}/venv", f"PYTHON={python}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean" in done.stderr
    # Nor has it begun to.
    assert set(calls.read_text().splitlines()) <= {"-m launcher.variables", "-m serve.arguments"}
    assert not (tmp_path / "venv").exists()


def test_a_gated_model_is_planned_without_a_token(tmp_path):
    nobody = {"HUGGINGFACE_TOKEN": "", "HF_TOKEN": "", "HF_HOME": str(tmp_path)}
    lines = [["plan", "MODEL=llama-7b", "HARDWARE=2x80GB"], ["train", "MODEL=llama-7b"], ["data", "MODEL=llama-7b"]]
    planned, *others = launch_in_turn(lines, nobody)
    assert planned.code == 0, planned.err
    assert "Next: " in planned.out
    for refused in others:
        assert (refused.code, refused.out) == (2, "")
        assert "export HUGGINGFACE_TOKEN" in refused.err


def test_the_token_is_never_shown():
    done = run_python(
        "-m", "launcher", "plan", "MODEL=llama-7b", "HARDWARE=80GB", env={"HUGGINGFACE_TOKEN": "hf_secret"}
    )
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
