"""Training for real: tiny models of both architectures, and two real processes under DeepSpeed."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch

from launcher import checkpoint, rundir
from launcher.errors import UserError
from launcher.loop import require_finite
from launcher.report import read_metrics
from launcher.variables import ROOT
from tests.running import run_python

SMALL = ["data.limit=64", "batch.size=8", "optim.lr=1e-2", "model.dtype=fp32", "checkpoint.every=4"]


def train(model, run, *args, program=("-m", "launcher", "train"), env=None):
    return run_python(*program, f"MODEL={model}", f"RUN={run}", *SMALL, *args, env=env)


def manifest(run):
    return json.loads((run / "run.json").read_text())


@pytest.mark.slow
def test_a_run_learns_and_leaves_what_stock_peft_reads(tiny, tmp_path):
    run = tmp_path / "run"
    done = train(tiny, run, "data.limit=8", "optim.epochs=60")
    assert done.returncode == 0, done.stderr
    assert "make chat" in done.stdout
    losses = [record["loss"] for record in read_metrics(run)]
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert manifest(run)["state"] == "finished"
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(run / "adapter"))
    assert AutoTokenizer.from_pretrained(run / "tokenizer").chat_template
    tuned = torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_B" in name])
    assert tuned.abs().max() > 0


@pytest.mark.slow
def test_an_evaluation_measures_the_base_and_the_run(tiny_llama, tmp_path):
    run = tmp_path / "run"
    assert train(tiny_llama, run).returncode == 0
    done = run_python("-m", "launcher", "eval", f"RUN={run}")
    assert done.returncode == 0, done.stderr
    measured = json.loads((run / "eval.json").read_text())
    assert measured["examples"] == len(measured["tuned"]["samples"]) == 200
    assert measured["tuned"]["loss"] < measured["base"]["loss"]
    # The same held-out loss that the training told at its end.
    assert measured["tuned"]["loss"] == pytest.approx(manifest(run)["results"]["loss"], abs=1e-3)
    refused = run_python("-m", "launcher", "eval", f"RUN={run}", "DATA=cafe")
    assert refused.returncode == 2
    assert "RUN=" in refused.stderr


@pytest.mark.slow
def test_accelerate_launch_works_without_the_front_door(tiny_llama, tmp_path):
    run = tmp_path / "run"
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/strategy/zero2.yaml"]
    program = (*launch, "--num_processes", "2", "--main_process_port", "0", "-m", "launcher.train")
    config = "configs/runs/smollm2-135m-cafe-lora-zero2.yaml"
    done = train(tiny_llama, run, config, "optim.max_steps=2", program=program)
    assert done.returncode == 0, done.stderr
    assert manifest(run)["training"]["engine"] == "DeepSpeedEngine"


@pytest.mark.slow
def test_qlora_trains_in_four_bits(tiny_llama, tmp_path):
    run = tmp_path / "run"
    done = train(tiny_llama, run, "PEFT=qlora", "data.limit=8", "optim.epochs=60")
    assert done.returncode == 0, done.stderr
    assert "paging exists on GPUs only" in done.stdout
    losses = [record["loss"] for record in read_metrics(run)]
    assert losses[-1] < 0.5 * losses[0]
    assert manifest(run)["base"]["quantisation"] == "nf4"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("args", [(), ("PEFT=qlora",), ("NGPU=2",)], ids=["lora", "qlora", "zero2"])
def test_an_interrupted_run_goes_on_where_it_was(tiny_llama, tmp_path, args):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(tiny_llama, whole, *args).returncode == 0
    assert train(tiny_llama, cut, *args).returncode == 0
    # As if it had been killed after the checkpoint of step 4.
    rundir.write_manifest(cut, {**manifest(cut), "state": "running"})
    assert checkpoint.newest(cut)[0].step == 4
    done = train(tiny_llama, cut, *args)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 4" in done.stdout
    first, second = (run / "adapter" / "adapter_model.safetensors" for run in (whole, cut))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "args", [(), ("STRATEGY=ddp", "NGPU=2"), ("STRATEGY=zero2", "NGPU=2")], ids=["one", "ddp", "zero2"]
)
def test_a_run_that_diverges_says_so_at_once(tiny_llama, tmp_path, args):
    run = tmp_path / "run"
    done = train(tiny_llama, run, "optim.lr=1e20", *args)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "the training diverged" in done.stderr
    assert "try a smaller optim.lr" in done.stderr
    assert all(math.isfinite(record["loss"]) for record in read_metrics(run))
    assert checkpoint.newest(run) == (None, [])


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (1.0, -1.0)]
)
def test_a_step_without_finite_numbers_is_the_last(loss, norm):
    require_finite(7, 1.0, 0.0)
    with pytest.raises(UserError, match="step 7: the training diverged"):
        require_finite(7, loss, norm)


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_exit_75(tiny_llama, tmp_path):
    run = tmp_path / "run"
    args = [f"MODEL={tiny_llama}", f"RUN={run}", *SMALL, "optim.epochs=200"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "train", *args], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 6:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 75
    assert "run the same command again" in out
    assert manifest(run)["state"] == "stopped"
    assert checkpoint.newest(run)[0].step == len(read_metrics(run))


def test_a_finished_run_is_never_overwritten_and_a_changed_one_not_resumed(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    from launcher.compose import load
    from launcher.variables import parse

    config = load(parse([f"RUN={run}"]))
    record = {
        "format": rundir.FORMAT,
        "state": "finished",
        "command": "make train",
        "config": config.model_dump(mode="json"),
    }
    rundir.write_manifest(run, record)
    done = run_python("-m", "launcher", "train", f"RUN={run}")
    assert done.returncode == 2
    assert f"RUN={run.name}-2" in done.stderr
    assert f"rm -r {run}" in done.stderr
    rundir.write_manifest(run, {**record, "state": "running"})
    done = run_python("-m", "launcher", "train", f"RUN={run}", "optim.lr=0.5")
    assert done.returncode == 2
    assert "optim.lr was 0.001, now 0.5" in done.stderr
