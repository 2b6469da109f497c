"""Training speed: our step, packed and padded, beside the plain one (full logits, the model's own loss), in one process.

    make bench          python -m bench.train [VARIABLE=value …] [section.option=value …]

The three take turns. Prints medians in real tokens a second, ratios, and the peak memory. Times on a shared machine are noisy: read the ratio.
"""

import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from bench.training import assembled
from launcher import loop, models
from launcher.batches import collate, each_alone
from launcher.compose import load
from launcher.errors import run_main
from launcher.job import Job, global_batch, load_model
from launcher.variables import parse

NUM_STEPS = 9


def plain_step(job: Job, step: int) -> None:
    """What a textbook loop does: pad, full logits, loss over masked labels, backward, step."""
    peft_model = job.peft_model
    batch = global_batch(job, step)
    for first in range(0, len(batch), job.micro):
        inputs = collate(each_alone(batch[first : first + job.micro]), job.accelerator.device)
        inputs["attention_mask"] = inputs.pop("documents")
        labels = inputs["input_ids"].masked_fill(~inputs.pop("trained"), -100)
        with job.accelerator.autocast():
            loss = peft_model(**inputs, labels=labels).loss
        loss.backward()
    job.inner_optimizer.step()
    job.inner_optimizer.zero_grad()


def timed(run: Callable[[], object]) -> float:
    """Seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(args: list[str]) -> int:
    """Measure, print one line a way and one JSON line."""
    config = load(parse([*args, f"RUN={tempfile.gettempdir()}/bench"]))
    job = assembled(config)
    with models.quiet():
        load_model(job)
    rates: dict[str, list[float]] = {"packed": [], "padded": [], "plain": []}
    for step in range(NUM_STEPS + 1):
        tokens = sum(len(example.ids) for example in global_batch(job, step))
        for name, rate in rates.items():
            job.is_packed = name == "packed"
            run = plain_step if name == "plain" else loop.train_step
            seconds = timed(lambda run=run, step=step: run(job, step))
            if step:  # the first step warms up
                rate.append(tokens / seconds)
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    for name, rate in medians.items():
        share = rate / medians["plain"]
        print(
            f"{name:6} {rate:8.1f} tokens/s, {share:.2f} x plain (median of {NUM_STEPS} steps of {config.batch.size})"
        )
    peak_gib = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    result = {"model": config.model.name, "method": config.adapter.method, **medians, "peak_gib": peak_gib, "on": where}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_main(main)
