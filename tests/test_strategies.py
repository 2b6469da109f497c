"""Every strategy really runs, learns the same, shares out what it says, and hands over to any other."""

import functools
import json

import pytest

from launcher import strategies
from launcher.report import read_metrics
from launcher.variables import ROOT, shipped
from tests.planted import planted
from tests.running import run_python

SMALL = [
    "batch.size=8", "optim.lr=1e-2", "optim.epochs=100", "model.dtype=fp32",
    "checkpoint.every=1000", "eval.every=1000", "eval.examples=3", "eval.answers=0",
]  # fmt: skip
MANY, FEW = 30, 8
ENGINES = {"single": "Trainee", "ddp": "DistributedDataParallel"}
DEEPSPEED = "DeepSpeedEngine"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "launcher.train"]
# As on a fresh machine: no compiler.
BARE = {"CXX": "/nonexistent", "PATH": "/nonexistent"}


@pytest.fixture(scope="module")
def small(tiny_llama, orders):
    return [f"MODEL={tiny_llama}", f"DATA={orders}", *SMALL]


def train(run, steps, *args, program=("-m", "launcher", "train"), **how):
    return run_python(*program, f"RUN={run}", f"optim.max_steps={steps}", *args, **how)


def trained(run, steps, *args, **how):
    """What a training that finishes leaves: (loss and norm of the gradient of each step, what run.json says of it)."""
    done = train(run, steps, *args, **how)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert len(steps_of(run)) == steps
    return steps_of(run), json.loads((run / "run.json").read_text())["training"]


def steps_of(run):
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(run)]


def assert_the_same(found, expected):
    for kind in (0, 1):
        assert [step[kind] for step in found] == pytest.approx([step[kind] for step in expected], abs=1e-3)


def stopped(run, *args):
    """Train for some more of the steps; a process tells itself to stop, for from outside the end may come first."""
    before = len(steps_of(run)) if run.exists() else 0
    told = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    env = planted(run.parent / "fault", told, rank=1 if "NGPU=2" in args else None, at=FEW // 2)
    done = train(run, FEW, *args, env=env)
    assert done.returncode == 75, done.stderr
    assert before < len(steps_of(run)) < FEW


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """The steps of each method in one process."""

    @functools.cache
    def of(method, steps):
        found, training = trained(tmp_path_factory.mktemp(method) / "run", steps, *small, f"PEFT={method}")
        assert (training["strategy"], training["engine"]) == ("single", "Trainee")
        return found

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "strategy", "ngpu", "steps", "answers"),
    [
        ("lora", "ddp", 2, MANY, 1), ("lora", "zero1", 2, MANY, 1), ("lora", "zero2", 2, MANY, 1), ("lora", "zero3", 2, MANY, 1),
        ("lora", "zero3-offload", 2, FEW, 0), ("lora", "zero3", 1, FEW, 0), ("lora", "zero3", 4, FEW, 0),
        ("ia3", "zero3", 2, FEW, 0), ("prefix", "zero2", 2, FEW, 1), ("prefix", "zero3", 2, FEW, 1),
    ],
)  # fmt: skip
def test_a_strategy_learns_what_one_process_learns(small, tmp_path, alone, method, strategy, ngpu, steps, answers):
    run, is_cold = tmp_path / "run", (method, strategy) == ("lora", "zero2")
    # Nor is there anything that a compiler left behind.
    env = BARE | ({"TORCH_EXTENSIONS_DIR": str(tmp_path)} if is_cold else {})
    args = [f"PEFT={method}", f"STRATEGY={strategy}", f"NGPU={ngpu}", f"eval.answers={answers}"]
    found, training = trained(run, steps, *small, *args, env=env, cold=is_cold)
    assert training["strategy"] == strategy
    assert training["engine"] == ENGINES.get(strategy, DEEPSPEED)
    assert training["world_size"] == ngpu
    assert_the_same(found, alone(method, steps))
    frozen = 112_448
    assert training["frozen_held"] == pytest.approx(frozen / ngpu if "zero3" in strategy else frozen, rel=0.01)
    assert (run / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        [("STRATEGY=zero2", "NGPU=2"), ("NGPU=1",), ("STRATEGY=ddp", "NGPU=2")],
        [("STRATEGY=zero3", "NGPU=2"), ("STRATEGY=single",)],
    ],
    ids=["2-1-2", "zero3-single"],
)
def test_a_run_goes_on_with_other_processes_and_another_strategy(small, tmp_path, alone, parts):
    run = tmp_path / "run"
    for args in parts[:-1]:
        stopped(run, *small, *args)
    found, _ = trained(run, FEW, *small, *parts[-1])
    assert_the_same(found, alone("lora", FEW))


@pytest.mark.slow
def test_torchrun_works_without_accelerate(small, tmp_path, alone):
    args = [*small, "parallel.strategy=zero2"]
    found, training = trained(tmp_path / "run", FEW, *args, program=TORCHRUN, cold=True)
    assert (training["strategy"], training["engine"]) == ("zero2", DEEPSPEED)
    assert_the_same(found, alone("lora", FEW))


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
