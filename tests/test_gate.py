"""The integrity gate: a file that is not what was trained stops the run and says which tensor."""

import json

import pytest
import torch
from safetensors.torch import save_file

from launcher import checkpoint, gate
from launcher.errors import IntegrityError
from tests.running import SMALL, run_python, train

TRAINED = {"a": torch.arange(4.0) + 1, "b": torch.ones(2, 3)}
START = gate.digests({"a": torch.zeros(4), "b": torch.zeros(2, 3)})

# Damages what is written into the adapter's file, as a broken disk, a sharded save or a lost update would.
PLANT = """
import sys, torch
from launcher import loop, methods, train
from launcher.errors import run_main
save = methods.save_file
first = {}
def keep_start(job, inner=loop.load_model):
    inner(job)
    first.update({k: v.clone() for k, v in methods.saved_tensors(job.peft_model).items()})
loop.load_model = keep_start
def planted(tensors, file, **rest):
    name = sorted(k for k in tensors if "lora_B" in k)[0]
    damage = {"empty": torch.zeros(0), "nan": tensors[name] * float("nan"), "unchanged": first[name]}["DAMAGE"]
    save({**tensors, name: damage}, file, **rest)
methods.save_file = planted
run_main(train.main)
"""
SAYS = {"empty": "is empty", "nan": "is not finite", "unchanged": "has not changed since the start"}


def write(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_what_was_trained_passes(tmp_path):
    gate.check_file(write(tmp_path, TRAINED), TRAINED, START)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ({"a": TRAINED["a"]}, "b is missing"),
        ({**TRAINED, "c": torch.ones(1)}, "c is unknown"),
        ({**TRAINED, "a": torch.zeros(0)}, "a is empty"),
        ({**TRAINED, "a": torch.tensor([1.0, float("nan"), 3, 4])}, "a is not finite"),
        ({**TRAINED, "a": torch.tensor([1.0, float("inf"), 3, 4])}, "a is not finite"),
        ({**TRAINED, "a": TRAINED["a"] * 1.01}, "a is not what was trained"),
        ({**TRAINED, "b": torch.zeros(2, 3)}, "b has not changed since the start"),
    ],
)
def test_what_was_not_names_the_tensor(tmp_path, saved, says):
    with pytest.raises(IntegrityError, match=says):
        gate.check_file(write(tmp_path, saved), TRAINED, START)


def test_a_file_that_cannot_be_read_back(tmp_path):
    file = write(tmp_path, TRAINED)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match="cannot be read back"):
        gate.check_file(file, TRAINED)


def test_what_never_had_a_gradient_may_stand_still_but_not_everything(tmp_path):
    still = {"a": torch.zeros(4), "b": TRAINED["b"]}
    gate.check_file(write(tmp_path, still), still, START, idle=["a"])
    nothing = {"a": torch.zeros(4), "b": torch.zeros(2, 3)}
    with pytest.raises(IntegrityError, match="a has not changed"):
        gate.check_file(write(tmp_path, nothing), nothing, START, idle=["a", "b"])


def test_logits_must_agree():
    live = torch.randn(1, 5, 7)
    assert gate.check_logits(live, live.clone(), "fp32") == 0
    with pytest.raises(IntegrityError, match="answers differently"):
        gate.check_logits(live, live + 0.01 * live.abs().max(), "fp32")
    with pytest.raises(IntegrityError):
        gate.check_logits(live, live * float("nan"), "bf16")


@pytest.mark.slow
def test_a_damaged_adapter_fails_the_run_and_keeps_the_checkpoint(tiny_llama, tmp_path):
    run = tmp_path / "run"
    for damage, says in SAYS.items():
        planted = PLANT.replace("DAMAGE", damage)
        done = run_python("-c", planted, f"MODEL={tiny_llama}", f"RUN={run}", *SMALL, "checkpoint.every=1", cold=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert says in done.stderr
        assert "lora_B.weight" in done.stderr
        assert "run the same command again" in done.stderr
        assert json.loads((run / "run.json").read_text())["state"] == "running"
        assert not (run / "adapter").exists()
        assert checkpoint.newest(run)[0].step == 1
    done = train(tiny_llama, run, "checkpoint.every=1", program=("-m", "launcher.train"))
    assert done.returncode == 0, done.stderr
    assert "resumed after step 1" in done.stdout
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
