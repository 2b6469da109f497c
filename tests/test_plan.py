"""Planning is pure: decisions for boxes that nobody here owns."""

import pytest

from launcher.compose import load
from launcher.errors import UserError
from launcher.hardware import Hardware, visible
from launcher.plan import num_steps, plan, split_batch
from launcher.variables import parse

LAPTOP = Hardware(num_gpus=0, num_cores=8, has_bf16=False)
EIGHT = Hardware(num_gpus=8, num_cores=64, has_bf16=True)


def config(*args):
    return load(parse(list(args)))


def test_one_process_is_plain_python():
    decided = plan(config(), 1, LAPTOP, ["optim.lr=1e-4"])
    assert decided.strategy == "single"
    assert decided.argv[1:] == ("-m", "launcher.train", "optim.lr=1e-4")
    assert decided.dtype == "fp32"
    assert decided.env["DS_ACCELERATOR"] == "cpu"


def test_several_processes_run_under_accelerate_with_our_file():
    decided = plan(config(), 4, EIGHT, [])
    assert decided.strategy == "zero2"
    assert "--config_file" in decided.argv
    assert decided.argv[decided.argv.index("--num_processes") + 1] == "4"
    assert decided.dtype == "bf16"
    assert "DS_ACCELERATOR" not in decided.env


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("size", [16, 48, 64])
def test_the_global_batch_is_kept_on_any_number_of_processes(world, size):
    micro, accumulation = split_batch(config(f"batch.size={size}"), world)
    assert micro * accumulation * world == size


def test_an_indivisible_batch_shows_all_three_numbers():
    with pytest.raises(UserError) as error:
        split_batch(config("batch.size=16", "batch.micro=3"), 2)
    assert "batch.size=16" in str(error.value)
    assert "2 processes" in str(error.value)
    assert "batch.micro=3" in str(error.value)


def test_more_processes_than_gpus_is_refused():
    with pytest.raises(UserError, match="this box has 8 GPUs"):
        plan(config(), 9, EIGHT, [])


def test_single_is_one_process():
    with pytest.raises(UserError, match="STRATEGY=zero2"):
        plan(config("STRATEGY=single"), 2, LAPTOP, [])


@pytest.mark.parametrize(
    ("devices", "left"), [(None, [8.0, 9.0]), ("", []), ("-1", []), ("1", [9.0]), ("1,0", [9.0, 8.0]), ("0,7,1", [8.0])]
)
def test_hidden_gpus_are_not_counted(devices, left):
    assert visible([8.0, 9.0], devices) == left


@pytest.mark.parametrize("args", [("PEFT=qlora",), ("optim.name=paged_adamw",)])
def test_what_is_not_sharded_runs_in_one_process(args):
    assert plan(config(*args), 1, EIGHT, []).strategy == "single"
    with pytest.raises(UserError, match="one process"):
        plan(config(*args, "STRATEGY=zero2"), 1, EIGHT, [])
    with pytest.raises(UserError, match="one process"):
        plan(config(*args), 2, EIGHT, [])


def test_steps():
    assert num_steps(config(), 2000) == 250
    assert num_steps(config("optim.epochs=0.5"), 2000) == 125
    assert num_steps(config("optim.max_steps=7"), 2000) == 7


def test_qlora_on_a_processor_says_that_it_does_not_page():
    assert "paging" in plan(config("PEFT=qlora"), 1, LAPTOP, []).notes[0]
    assert plan(config("PEFT=qlora"), 1, EIGHT, []).notes == ()
