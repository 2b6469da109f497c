"""The program every process runs: `python -m launcher.train`, or under `accelerate launch … -m launcher.train`.

`train` is the whole story, top to bottom: data -> model -> prepare -> (step | checkpoint | stop? | evaluate) -> save -> verify.
"""

import contextlib
import math
import shlex
import signal
import time
from typing import Any

import torch

from launcher import checkpoint, data, outcome, rundir
from launcher.batches import collate, micro_batches
from launcher.catalogue import card
from launcher.compose import load
from launcher.config import Config
from launcher.encoding import Example, count_trained
from launcher.errors import EXIT_STOPPED, UserError, run_main
from launcher.held_out import evaluate
from launcher.job import (
    Job,
    assemble,
    check_strategy,
    global_batch,
    load_model,
    save_checkpoint,
    start_processes,
    world_size,
)
from launcher.material import load_material
from launcher.models import read_shape
from launcher.plan import choose_strategy
from launcher.report import Report
from launcher.variables import parse
from launcher.weights import fetch, fetch_again


class StopFlag:
    """Set by SIGTERM or SIGINT; the loop stops at the next step, with a checkpoint."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, *_: Any) -> None:
        self.is_set = True


def main(args: list[str]) -> int:
    """Train the configuration that `args` describe (see `variables.parse`); returns the exit code."""
    given = parse(args)
    config = load(given)
    if given.ngpu not in (None, world_size()):
        raise UserError(
            f"NGPU={given.ngpu}, but {world_size()} process(es) were started; try: make train NGPU={given.ngpu}"
        )
    choose_strategy(config, world_size())
    # All that can be refused, and the download, come before the processes join: nobody waits for one that has left.
    before = rundir.read_manifest(config.run_dir) if rundir.check_claim(config) else None
    splits = data.read(config.data)
    if before:
        splits.require(before["data"], config.data.source)
        weights = fetch_again(card(config.model.name), before["base"])
    else:
        weights = fetch(card(config.model.name), config.model.revision)
    shape = read_shape(weights.path)
    material = load_material(config, splits, weights.path, shape.context)
    accelerator = start_processes(config)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(rundir.locked(config.run_dir))
        return train(
            assemble(config, accelerator, weights, material, shape),
            shlex.join(["python", "-m", "launcher.train", *args]),
        )


def train(job: Job, command: str) -> int:
    """One run from its data to a verified adapter; returns the exit code."""
    started = time.monotonic()
    config, accelerator = job.config, job.accelerator
    load_model(job)
    check_strategy(job)
    step = resume(job)
    stop = StopFlag()
    manifest = outcome.describe(job, command)
    if accelerator.is_main_process:
        rundir.write_manifest(config.run_dir, manifest)
    with Report(config.run_dir, job.steps, step, is_main=accelerator.is_main_process) as report:
        outcome.announce(job, report, step)
        report.evaluation(evaluate(job, step))
        while step < job.steps:
            metrics = train_step(job, step)
            step += 1
            report.step(step, metrics)
            stopping = is_stop_agreed(job, stop)
            if stopping or (step % config.run.checkpoint_every == 0 and step < job.steps):
                save_checkpoint(job, step)
            if stopping:
                return end_stopped(job, manifest, report, step)
            if step % config.eval.every == 0 and step < job.steps:
                report.evaluation(evaluate(job, step))
        last = outcome.conclude(job, report, step)
    results = {**last, "wall_s": round(time.monotonic() - started, 1)}
    if accelerator.is_main_process:
        outcome.finish(job, manifest, results)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def resume(job: Job) -> int:
    """Load the newest checkpoint that verifies; the number of steps already done, 0 for a fresh run."""
    found, passed_over = checkpoint.newest(job.config.run_dir)
    for line in passed_over:
        job.accelerator.print(line)
    if found is None:
        return 0
    if job.is_sharded:
        # DeepSpeed makes its optimizer states at the first step: take one without a gradient, then fill them.
        run_batch(job, global_batch(job, found.step), scale=0.0)
    state = checkpoint.read(found)
    checkpoint.put_back(state, job.parameters, job.inner_optimizer, step=found.step, sharded=job.is_sharded)
    return found.step


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to zero (arXiv:1608.03983, without restarts); a pure function of the step."""
    warmup = math.ceil(config.optim.warmup * steps)
    if step < warmup:
        return config.optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(job: Job, step: int) -> dict[str, Any]:
    """One optimizer step on the global batch of `step`.

    The gradient is that of the mean over the trained tokens of the whole batch, whatever the number of processes and the
    accumulation: both average over themselves, so each micro-batch's sum is scaled back by world x accumulation.
    """
    started = time.monotonic()
    accelerator, config = job.accelerator, job.config
    world = accelerator.num_processes
    # A step's random numbers depend on nothing but the step, so a resumed run draws the same.
    torch.manual_seed((config.run.seed << 32) + step * world + accelerator.process_index)
    lr = learning_rate(config, step, job.steps)
    for group in job.optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
    batch = global_batch(job, step)
    num_tokens, num_trained = sum(len(example.ids) for example in batch), count_trained(batch)
    scale = world * accelerator.gradient_accumulation_steps / max(1, num_trained)
    total, norm = run_batch(job, batch, scale)
    seconds = time.monotonic() - started
    return {
        "loss": accelerator.reduce(total, "sum").item() / max(1, num_trained),
        "lr": lr,
        "grad_norm": norm,
        "tokens": num_tokens,
        "trained_tokens": num_trained,
        "tokens_per_s": round(num_tokens / seconds, 1),
        "step_s": round(seconds, 3),
    }


def run_batch(job: Job, batch: list[Example], scale: float) -> tuple[torch.Tensor, float]:
    """This process's share of one optimizer step: (its summed loss, the norm of the gradient before clipping)."""
    accelerator = job.accelerator
    total = torch.zeros((), device=accelerator.device)
    norm: Any = None
    for micro in micro_batches(batch, accelerator.process_index, accelerator.num_processes, job.micro):
        with accelerator.accumulate(job.model):
            loss = job.model(**collate(job.rows(micro), accelerator.device))
            accelerator.backward(loss * scale)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(job.parameters.values(), job.config.optim.clip)
            job.optimizer.step()
            job.optimizer.zero_grad()
            total += loss.detach()
    return total, float(job.model.get_global_grad_norm() if job.is_sharded else norm)


def is_stop_agreed(job: Job, stop: StopFlag) -> bool:
    """Whether any process was told to stop; all of them get the same answer."""
    flag = torch.tensor(float(stop.is_set), device=job.accelerator.device)
    return job.accelerator.reduce(flag, "sum").item() > 0


def end_stopped(job: Job, manifest: dict[str, Any], report: Report, step: int) -> int:
    """Leave a run that was told to stop."""
    if job.accelerator.is_main_process:
        rundir.write_manifest(job.config.run_dir, {**manifest, "state": "stopped"})
    report.say(f"stopped after step {step} with a checkpoint; run the same command again to go on")
    job.accelerator.end_training()
    return EXIT_STOPPED


if __name__ == "__main__":
    run_main(main)
