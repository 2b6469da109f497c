"""Every strategy really runs, learns the same, shares out what it says, and hands over to any other."""

import json

import pytest

from launcher import strategies
from launcher.report import read_metrics
from launcher.variables import ROOT, shipped
from tests.planted import planted
from tests.running import run_python

STEPS = 30
SMALL = [
    "data.limit=64", "batch.size=8", "optim.lr=1e-2", "optim.epochs=100", f"optim.max_steps={STEPS}", "model.dtype=fp32",
    "checkpoint.every=1000", "eval.every=1000", "eval.examples=3", "eval.answers=1",
]  # fmt: skip
ENGINES = {"single": "Trainee", "ddp": "DistributedDataParallel"}
DEEPSPEED = "DeepSpeedEngine"


def command(model, run, *args):
    return ["-m", "launcher", "train", f"MODEL={model}", f"RUN={run}", *SMALL, *args]


def trained(model, run, *args, env=None):
    """(losses, what run.json says of the training) of a run that finished."""
    done = run_python(*command(model, run, *args), env=env)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return losses(run), json.loads((run / "run.json").read_text())["training"]


def losses(run):
    return [record["loss"] for record in read_metrics(run)]


def stopped(model, run, *args):
    """Train for some more of the steps; a process tells itself to stop, for from outside the end may come first."""
    before = len(losses(run)) if run.exists() else 0
    told = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    env = planted(run.parent / "fault", told, rank=1 if "NGPU=2" in args else None, at=STEPS // 3)
    done = run_python(*command(model, run, *args), env=env)
    assert done.returncode == 75, done.stderr
    assert before < len(losses(run)) < STEPS


@pytest.fixture(scope="module")
def alone(tiny_llama, tmp_path_factory):
    """The losses of each method in one process."""
    found = {}

    def of(method):
        if method not in found:
            found[method], training = trained(tiny_llama, tmp_path_factory.mktemp(method) / "run", f"PEFT={method}")
            assert (training["strategy"], training["engine"]) == ("single", "Trainee")
        return found[method]

    return of


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("method", "strategy", "ngpu"),
    [
        ("lora", "ddp", 2), ("lora", "zero1", 2), ("lora", "zero2", 2), ("lora", "zero3", 2), ("lora", "zero3-offload", 2),
        ("lora", "zero3", 1), ("lora", "zero3", 4), ("ia3", "zero3", 2), ("prefix", "zero2", 2), ("prefix", "zero3", 2),
    ],
)  # fmt: skip
def test_a_strategy_learns_what_one_process_learns(tiny_llama, tmp_path, alone, method, strategy, ngpu):
    # As on a fresh machine: no compiler, and nothing that one left behind.
    bare = {"CXX": "/nonexistent", "PATH": "/nonexistent", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    args = [f"PEFT={method}", f"STRATEGY={strategy}", f"NGPU={ngpu}"]
    found, training = trained(tiny_llama, tmp_path / "run", *args, env=bare)
    assert training["strategy"] == strategy
    assert training["engine"] == ENGINES.get(strategy, DEEPSPEED)
    assert training["world_size"] == ngpu
    assert len(found) == STEPS
    assert found == pytest.approx(alone(method), abs=1e-3)
    frozen = 112_448
    assert training["frozen_held"] == pytest.approx(frozen / ngpu if "zero3" in strategy else frozen, rel=0.01)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "parts",
    [
        [("STRATEGY=zero2", "NGPU=2"), ("NGPU=1",), ("STRATEGY=ddp", "NGPU=2")],
        [("STRATEGY=zero3", "NGPU=2"), ("STRATEGY=single",)],
    ],
    ids=["2-1-2", "zero3-single"],
)
def test_a_run_goes_on_with_other_processes_and_another_strategy(tiny_llama, tmp_path, alone, parts):
    run = tmp_path / "run"
    for args in parts[:-1]:
        stopped(tiny_llama, run, *args)
    found, _ = trained(tiny_llama, run, *parts[-1])
    assert len(found) == STEPS
    assert found == pytest.approx(alone("lora"), abs=1e-3)


@pytest.mark.slow
def test_torchrun_works_without_accelerate(tiny_llama, tmp_path, alone):
    run = tmp_path / "run"
    args = command(tiny_llama, run, "parallel.strategy=zero2")[2:]
    program = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "launcher.train",
        *args[1:],
    ]
    done = run_python(*program)
    assert done.returncode == 0, done.stderr
    training = json.loads((run / "run.json").read_text())["training"]
    assert (training["strategy"], training["engine"]) == ("zero2", DEEPSPEED)
    assert losses(run) == pytest.approx(alone("lora"), abs=1e-3)


def test_the_page_is_printed_from_the_table():
    assert (ROOT / "docs" / "strategies.md").read_text() == strategies.page()


def test_the_table_has_every_combination_and_the_planner_obeys_it():
    from launcher.compose import load
    from launcher.errors import UserError
    from launcher.hardware import Hardware
    from launcher.plan import plan
    from launcher.variables import parse

    rows = list(strategies.matrix())
    assert len(rows) == len(strategies.METHODS) * len(shipped("strategy")) * 2 * 2
    for method, name, world, dtype, why in rows:
        try:
            asked = load(parse([f"PEFT={method}", f"parallel.strategy={name}", f"model.dtype={dtype}"]))
            decided = plan(asked, world, Hardware(8, 64, has_bf16=True), [])
            assert (why, decided.strategy, decided.dtype) == (None, name, dtype)
        except UserError as error:
            assert str(error) == why


@pytest.mark.parametrize("name", shipped("strategy"))
def test_a_strategy_is_a_file_that_accelerate_reads(name):
    from accelerate.commands.config import load_config_from_file

    read = load_config_from_file(strategies.named(name).file)
    assert str(read.distributed_type.value) == {"single": "NO", "ddp": "MULTI_GPU"}.get(name, "DEEPSPEED")
    assert strategies.deepspeed_facts(name).get("offload_optimizer_device", "none") == "none"
    assert (strategies.deepspeed_facts(name).get("offload_param_device", "none") != "none") == ("offload" in name)
