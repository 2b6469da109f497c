"""Peak memory of one training process, planned and measured.

    python -m bench.memory                                       every case, as a Markdown table
    python -m bench.memory lora smollm2-135m 256 4 [option …]    one case, as a line of JSON

Each case has a process of its own, which loads the model as training does and takes two of its real steps. Measured is the
growth of its resident memory, to its highest point, from where the libraries are imported and the data is read.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher import architecture, memory
from launcher.arithmetic import resolve_dtype
from launcher.catalogue import card
from launcher.compose import load
from launcher.config import Config
from launcher.errors import UserError, run_main
from launcher.hardware import detect
from launcher.variables import parse
from launcher.weights import fetch

MODELS = ("smollm2-135m", "gpt-2")
METHODS = ("lora", "qlora", "ia3", "prefix")
# GPT-2 reads 1024 tokens, of which a prefix takes 64.
SIZES = ((256, 4), (960, 2))
NUM_STEPS = 2
# What is on the device; nothing is offloaded here.
PARTS = [field.name for field in dataclasses.fields(memory.Memory) if field.name != "host"]
# glibc gives a freed block back to the kernel at once if it was mapped for itself: then resident memory is live memory.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def cases() -> Iterator[list[str]]:
    """The arguments of every case: method, model, tokens an example, examples a micro-batch, options."""
    for model in MODELS:
        for method in METHODS:
            for length, micro in SIZES:
                yield [method, model, str(length), str(micro)]
    for model in MODELS:
        yield ["lora", model, "960", "2", "model.gradient_checkpointing=true"]


def configure(method: str, model: str, length: int, micro: int, options: list[str], folder: Path) -> Config:
    """The configuration of a case; a step is one micro-batch."""
    path = random_gpt2(folder / "gpt-2") if model == "gpt-2" else model
    words = [f"PEFT={method}", f"MODEL={path}", f"RUN={folder}/run", f"data.max_length={length}", "batch.packing=off"]
    return load(parse([*words, f"batch.size={micro}", f"batch.micro={micro}", *options]))


def random_gpt2(folder: Path) -> str:
    """A model of GPT-2's sizes with random weights and SmolLM2's tokenizer: memory does not ask what they mean."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(fetch(card("smollm2-135m")).path).save_pretrained(folder)
    return str(folder)


def measure(config: Config) -> int:
    """Bytes that loading the model and the first steps add to this process, at their highest."""
    import bitsandbytes  # noqa: F401  what training imports on its way belongs to where measuring starts

    from bench.training import assembled
    from launcher import models
    from launcher.job import load_model
    from launcher.loop import train_step

    job = assembled(config)
    job.material = dataclasses.replace(job.material, train=[full_example(config.data.max_length)] * 100)
    models.count_parameters(job.weights.path)
    before = reset_peak()
    with models.quiet():
        load_model(job)
    print(f"loading alone: {(status('VmHWM') - before) / 1e6:.0f} MB", file=sys.stderr)
    for step in range(NUM_STEPS):
        train_step(job, step)
    return status("VmHWM") - before


def full_example(length: int) -> Any:
    """An example of exactly so many tokens, all of them trained."""
    import numpy as np

    from launcher.encoding import Example

    return Example(np.arange(length, dtype=np.int32), np.ones(length, bool))


def status(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found, name
    return int(found[1]) * 1024


def reset_peak() -> int:
    """Resident bytes now; the highest so far, VmHWM, starts from here (see proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def one(args: list[str]) -> dict[str, Any]:
    """Plan and measure one case in this process."""
    method, model, length, micro, *options = args
    with tempfile.TemporaryDirectory() as name:
        config = configure(method, model, int(length), int(micro), options, Path(name))
        planned = memory.estimate(
            config,
            architecture.read_file(fetch(card(config.model.name)).path),
            micro=int(micro),
            length=int(length),
            dtype=resolve_dtype(config, detect().has_bf16),
            on_gpu=False,
            has_mask=False,
        )
        measured = measure(config)
    return {"case": args, **dataclasses.asdict(planned), "total": planned.total, "measured": measured}


def in_own_process(args: list[str]) -> dict[str, Any]:
    """Plan and measure one case in a process of its own; raises `UserError` with the last thing it said."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", *args], env=os.environ | MALLOC, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{' '.join(args)}: {done.stderr.strip().splitlines()[-1]}; try this case alone")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(found: dict[str, Any]) -> str:
    """One case as a row of the table, in MB."""
    method, model, length, micro, *options = found["case"]
    name = method + " *" * bool(options)
    difference = 100 * (found["total"] / found["measured"] - 1)
    numbers = [f"{found[name] / 1e6:.0f}" for name in (*PARTS, "total", "measured")]
    return "| " + " | ".join([name, model, f"{micro} x {length}", *numbers, f"{difference:+.1f} %"]) + " |"


def main(args: list[str]) -> int:
    """Measure what `args` name, or everything."""
    if args:
        print(json.dumps(one(args)))
        return 0
    print("| " + " | ".join(["method", "model", "batch", *PARTS, "planned", "measured", "difference"]) + " |")
    print("|---" * (len(PARTS) + 6) + "|")
    for case in cases():
        print(row(in_own_process(case)), flush=True)
    print("\n\\* with gradient checkpointing. In MB; batch: examples x tokens.")
    return 0


if __name__ == "__main__":
    run_main(main)
