"""Training for real: tiny models of both architectures, and two real processes under DeepSpeed."""

import json
import math
import shutil
import signal
import subprocess

import pytest
import torch

from launcher import checkpoint, rundir
from launcher.errors import UserError
from launcher.loop import require_finite
from launcher.report import read_metrics
from tests.running import SMALL, run_python, start_python, train
from tests.serve_fixtures import PATIENCE, wait_until


def manifest(run):
    return json.loads((run / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_learns_and_leaves_what_stock_peft_reads(trained_run, family):
    run = trained_run("lora", family)
    assert "make chat" in (run.parent / "said").read_text()
    losses = [record["loss"] for record in read_metrics(run)]
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert manifest(run)["state"] == "finished"
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(run.parent / "model")
    model = PeftModel.from_pretrained(base, str(run / "adapter"))
    assert AutoTokenizer.from_pretrained(run / "tokenizer").chat_template
    tuned = torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_B" in name])
    assert tuned.abs().max() > 0


@pytest.mark.slow
def test_an_evaluation_measures_the_base_and_the_run(trained_run, tmp_path):
    run = shutil.copytree(trained_run("lora", "llama"), tmp_path / "run")
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
def test_qlora_trains_in_four_bits(trained_run):
    run = trained_run("qlora", "llama")
    assert "paging exists on GPUs only" in (run.parent / "said").read_text()
    losses = [record["loss"] for record in read_metrics(run)]
    assert losses[-1] < 0.5 * losses[0]
    assert manifest(run)["base"]["quantisation"] == "nf4"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("args", [(), ("PEFT=qlora",), ("NGPU=2",)], ids=["lora", "qlora", "zero2"])
def test_an_interrupted_run_goes_on_where_it_was(tiny_llama, tmp_path, args):
    run = tmp_path / "run"
    words = ("data.limit=32", "checkpoint.every=2", *args)
    assert train(tiny_llama, run, *words).returncode == 0
    whole = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    # As if it had been killed after the checkpoint of step 2.
    shutil.rmtree(run / "adapter")
    rundir.write_manifest(run, {**manifest(run), "state": "running"})
    assert checkpoint.newest(run)[0].step == 2
    done = train(tiny_llama, run, *words)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 2" in done.stdout
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "args", [(), ("STRATEGY=ddp", "NGPU=2"), ("STRATEGY=zero2", "NGPU=2")], ids=["one", "ddp", "zero2"]
)
def test_a_run_that_diverges_says_so_at_once(tiny_llama, tmp_path, args):
    run = tmp_path / "run"
    done = train(tiny_llama, run, "data.limit=64", "checkpoint.every=4", "optim.lr=1e20", *args)
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
    args = [f"MODEL={tiny_llama}", f"RUN={run}", *SMALL, "optim.epochs=2000"]
    metrics = run / "metrics.jsonl"
    with start_python("-m", "launcher", "train", *args, stdout=subprocess.PIPE) as process:
        wait_until(
            lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= 6),
            10 * PATIENCE,
        )
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate()
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
