"""Planning is pure: decisions for boxes that nobody here owns."""

import os
import subprocess
import sys

import pytest

from launcher import __main__ as front_door
from launcher import architecture
from launcher.arithmetic import num_steps, smaller_micro, split_batch
from launcher.catalogue import card
from launcher.choices import Demand
from launcher.compose import load
from launcher.errors import UserError
from launcher.hardware import GIB, Hardware, describe, visible
from launcher.plan import Nodes, halve, plan
from launcher.ports import HIGHEST, LOWEST, meeting_port
from launcher.variables import ROOT, parse
from tests.running import launch_in_turn

LAPTOP = Hardware(num_gpus=0, num_cores=8, has_bf16=False)
EIGHT = Hardware(num_gpus=8, num_cores=64, has_bf16=True)


def config(*args):
    return load(parse(list(args)))


def test_one_process_is_plain_python():
    decided = plan(config(), 1, LAPTOP, ["optim.lr=1e-4"])
    assert decided.strategy == "single"
    said = ("parallel.strategy=single", "batch.micro=8")
    assert decided.argv[1:] == ("-m", "launcher.train", "optim.lr=1e-4", *said)
    assert decided.dtype == "fp32"
    assert decided.env["DS_ACCELERATOR"] == "cpu"


def test_an_option_set_to_nothing_reaches_the_processes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {max_steps: 2}\n", encoding="utf-8")
    args = [str(file), "optim.max_steps="]
    given, read = front_door.read(args)
    assert read.optim.max_steps is None
    _, decided = front_door.make_plan(args, given, read)
    handed_on = decided.argv[decided.argv.index("launcher.train") + 1 :]
    assert config(*handed_on).optim.max_steps is None


@pytest.mark.parametrize(
    ("sizes", "most"), [({"n_positions": 512}, 504), ({"n_positions": 512, "sliding_window": 16}, 15)]
)
def test_a_prefix_is_no_longer_than_what_the_model_sees(sizes, most):
    model = architecture.read(card("gpt-2").config | {"model_type": "x", "intermediate_size": 3072} | sizes)
    demand = Demand(model, 8)
    assert plan(config("PEFT=prefix", f"adapter.num_tokens={most}"), 1, LAPTOP, [], demand).world == 1
    says = f"num_tokens={most + 1}: this model has room for a prefix of {most} tokens; try adapter.num_tokens={min(30, most)}"
    with pytest.raises(UserError, match=f"^adapter.{says}$"):
        plan(config("PEFT=prefix", f"adapter.num_tokens={most + 1}"), 1, LAPTOP, [], demand)


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


def test_a_reader_that_has_seen_enough_is_no_fault():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as nobody_reads:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", "plan"],
            cwd=ROOT,
            stdout=nobody_reads,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


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


LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
MODELS = {
    "gpt-2": card("gpt-2").config,
    "135m": card("smollm2-135m").config,
    "7b": card("llama-7b").config,
    "13b": {
        **LLAMA, "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824
    },
    "70b": {
        **LLAMA, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
}  # fmt: skip
NOTHING = "does not fit"
# 64 examples a step of at most 1,024 tokens; every GPU of the box, one for qlora.
BOXES = """
gpt-2 8GB lora single 8 8
gpt-2 8GB qlora single 8 8
gpt-2 8GB ia3 single 8 8
gpt-2 8GB prefix single 8 8
gpt-2 4x24GB lora zero2 16 1
gpt-2 64x80GB lora zero2 1 1
135m 4GB lora single 2 32
135m 8GB lora single 4 16
135m 8GB qlora single 8 8
135m 16GB lora single 8 8
135m 2x8GB prefix zero2 8 4
135m 8x24GB ia3 zero2 8 1
135m 64x80GB lora zero2 1 1
7b 8GB lora nothing
7b 8GB qlora nothing
7b 12GB lora zero3-offload 1 64
7b 16GB lora zero3-offload 2 32
7b 16GB qlora single 1 64
7b 24GB lora single 1 64
7b 24GB qlora single 2 32
7b 24GB ia3 single 1 64
7b 24GB prefix single 2 32
7b 2x16GB lora zero3 1 32
7b 2x24GB lora zero2 1 32
7b 4x16GB lora zero3 1 16
7b 8x24GB lora zero2 1 8
7b 80GB lora single 8 8
7b 8x80GB lora zero2 8 1
7b 64x80GB lora zero2 1 1
13b 24GB lora zero3-offload 2 32
13b 24GB qlora single 1 64
13b 2x24GB lora zero3-offload 2 16
13b 4x24GB lora zero3 1 16
13b 8x80GB lora zero2 4 2
70b 80GB lora zero3-offload 2 32
70b 80GB qlora nothing
70b 8x24GB lora nothing
70b 4x80GB lora zero3 1 16
70b 8x80GB lora zero3 1 8
70b 64x80GB lora zero3 1 1
"""


def decide(model, box, method, *args):
    hardware = describe(box)
    ngpu = 1 if method == "qlora" else hardware.num_gpus
    asked = config(f"PEFT={method}", "batch.size=64", *args)
    return plan(asked, ngpu, hardware, [], Demand(architecture.read(MODELS[model]), 1024))


@pytest.mark.parametrize("row", BOXES.strip().splitlines())
def test_decisions_for_described_boxes(row):
    model, box, method, *expected = row.split()
    try:
        decided = decide(model, box, method)
        found = [decided.strategy, str(decided.micro), str(decided.accumulation)]
        assert decided.micro * decided.accumulation * decided.world == 64
        assert decided.memory.total <= 0.92 * describe(box).gpu_bytes
    except UserError as error:
        assert "does not fit" in str(error)
        assert "; try " in str(error)
        found = ["nothing"]
    assert found == expected


def test_there_are_forty_boxes():
    assert len(set(BOXES.strip().splitlines())) == 40


def test_a_strategy_asked_for_by_name_is_taken_with_a_doubt():
    decided = decide("7b", "2x8GB", "lora", "STRATEGY=zero2")
    assert decided.strategy == "zero2"
    assert any("more memory than there is" in note for note in decided.doubts)


def test_recomputing_activations_makes_room():
    assert (
        decide("7b", "1x24GB", "lora", "model.gradient_checkpointing=true").micro > decide("7b", "1x24GB", "lora").micro
    )


def test_offloading_asks_for_host_memory():
    asked = config("STRATEGY=zero3-offload", "batch.size=64")
    demand = Demand(architecture.read(MODELS["70b"]), 1024)
    small, large = (Hardware(1, 8, True, 80 * GIB, host * GIB) for host in (64, 256))
    assert any("more memory" in note for note in plan(asked, 1, small, [], demand).doubts)
    assert not any("more memory" in note for note in plan(asked, 1, large, [], demand).doubts)


@pytest.mark.parametrize(("micro", "share", "smaller"), [(16, 64, 8), (6, 6, 3), (3, 6, 1), (5, 5, 1), (1, 8, None)])
def test_a_smaller_micro_batch_divides_the_same_share(micro, share, smaller):
    assert smaller_micro(micro, share) == smaller


def test_halving_keeps_the_global_batch():
    decided = plan(config("batch.size=32"), 2, LAPTOP, [])
    smaller = halve(decided)
    assert (smaller.micro, smaller.accumulation) == (decided.micro // 2, decided.accumulation * 2)
    assert smaller.argv[-1] == f"batch.micro={smaller.micro}"
    assert halve(plan(config("batch.micro=1"), 2, LAPTOP, [])) is None


def test_several_machines_meet_at_one_address():
    decided = plan(config("batch.size=32"), 2, EIGHT, [], nodes=Nodes(4, 1, "node-0", 21000))
    assert (decided.world, list(decided.ranks)) == (8, [2, 3])
    words = " ".join(decided.argv)
    for said in ("--num_machines 4", "--machine_rank 1", "--main_process_ip node-0", "--main_process_port 21000"):
        assert said in words
    assert "--num_processes 8" in words


def test_the_port_is_the_same_on_all_machines_and_another_for_another_job():
    ports = {meeting_port("runs/a", {"SLURM_JOB_ID": str(job)}) for job in range(50)}
    assert meeting_port("runs/a", {"SLURM_JOB_ID": "1"}) == meeting_port("runs/a", {"SLURM_JOB_ID": "1"})
    assert len(ports) > 45
    assert all(LOWEST <= port < HIGHEST for port in ports)
    assert 29500 not in range(LOWEST, HIGHEST + 1) or meeting_port("x", {}) != 29500


def test_a_plan_for_described_hardware_needs_no_torch_and_no_weights():
    (told,) = launch_in_turn([["plan", "MODEL=llama-7b", "HARDWARE=4x24GB"]], {"HUGGINGFACE_TOKEN": "x"})
    assert (told.code, told.loaded) == (0, []), told.err
    assert "strategy   zero2, 4 processes" in told.out
    for part in ("weights", "adapter", "gradients", "moments", "activations", "logits", "buffers"):
        assert part in told.out
