"""The visible loop: model -> resume -> (step | stop? | evaluate | checkpoint) -> save -> verify -> finish."""

import math
import resource
import time
from typing import Any

import torch

from launcher import checkpoint, outcome, rundir
from launcher.arithmetic import smaller_micro
from launcher.batches import collate, micro_batches
from launcher.config import Config
from launcher.effort import Pace
from launcher.encoding import Example, count_trained
from launcher.errors import EXIT_STOPPED, UserError
from launcher.failures import is_out_of_memory
from launcher.held_out import effort, evaluate
from launcher.job import Job, check_strategy, global_batch, is_stop_agreed, load_model, save_checkpoint
from launcher.report import Report


def train(job: Job, command: str) -> int:
    """One run from its model to a verified adapter; returns the exit code."""
    started = time.monotonic()
    config, accelerator = job.config, job.accelerator
    load_model(job)
    load_s = time.monotonic() - started
    check_strategy(job)
    step = resume(job)
    manifest = outcome.describe(job, command)
    if accelerator.is_main_process:
        rundir.write_manifest(config.run_dir, manifest)
    pace = Pace(effort(config, job.material, job.steps), load_s)
    with Report(config.run_dir, pace, step, is_main=accelerator.is_main_process) as report:
        outcome.announce(job, report, step)
        found = evaluate(job, step)
        report.evaluation(found)
        is_stopping = found is None
        while step < job.steps and not is_stopping:
            metrics = step_within_memory(job, report, step)
            step += 1
            require_finite(step, metrics["loss"], metrics["grad_norm"])
            report.step(step, metrics)
            found = None
            is_stopping = is_stop_agreed(job)
            if not is_stopping and is_due(step, config.eval.every, job.steps):
                found = evaluate(job, step)
                report.evaluation(found)
                is_stopping = found is None
            if is_stopping or is_due(step, config.checkpoint.every, job.steps) or job.is_checkpoint_owed:
                keep_state(job, report, step, found.loss if found else None)
        results = None if is_stopping else outcome.conclude(job, report, step)
        if results is None:
            return end_stopped(job, manifest, report, step)
    results |= {"wall_s": round(time.monotonic() - started, 1)}
    if accelerator.is_main_process:
        outcome.finish(job, manifest, results)
    job.stop.is_leaving = True
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps is done now; after the last step all is done anyway."""
    return step % every == 0 and step < steps


def keep_state(job: Job, report: Report, step: int, loss: float | None) -> None:
    """Write a checkpoint; on a full disk say so, go on, and try again after the next step."""
    was_owed = job.is_checkpoint_owed
    job.is_checkpoint_owed = not save_checkpoint(job, step, loss)
    if job.is_checkpoint_owed and not was_owed:
        report.say(
            f"the disk is full: no checkpoint of step {step}, the last good one is step {job.saved_step}; training goes on "
            "and tries again after every step. Free some space."
        )
    elif was_owed and not job.is_checkpoint_owed:
        report.say(f"there is space again: checkpoint of step {step} written")


def resume(job: Job) -> int:
    """Load the newest checkpoint that verifies; the number of steps already done, 0 for a fresh run."""
    found, passed_over = checkpoint.newest(job.config.run_dir)
    for line in passed_over:
        job.accelerator.print(line)
    if found is None:
        return 0
    if job.stage is not None:
        # DeepSpeed makes its optimizer states at the first step: take one without a gradient, then fill them.
        run_batch(job, global_batch(job, found.step), scale=0.0)
    state = checkpoint.read(found)
    checkpoint.put_back(state, job.parameters, job.inner_optimizer, step=found.step, stage=job.stage)
    job.saved_step = found.step
    return found.step


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to zero (arXiv:1608.03983, without restarts); a pure function of the step."""
    warmup = math.ceil(config.optim.warmup * steps)
    if step < warmup:
        return config.optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


def step_within_memory(job: Job, report: Report, step: int) -> dict[str, Any]:
    """One step; where a process that is alone runs out of memory, the same step again in smaller parts.

    Several processes cannot: the others wait in the middle of a gradient. `supervise` starts them again. Any other error
    costs no step either: what was learned before it is kept first.
    """
    while True:
        try:
            return train_step(job, step)
        except Exception as error:
            if job.accelerator.num_processes > 1 or job.stage is not None:
                raise
            if not is_out_of_memory(error):
                if step > job.saved_step:
                    save_checkpoint(job, step)
                raise
        # Behind the handler, which holds on to the frames and so to the tensors that did not fit.
        share = job.micro * job.accelerator.gradient_accumulation_steps
        smaller = smaller_micro(job.micro, share)
        if smaller is None:
            raise UserError(
                f"step {step + 1}: one example at a time does not fit into memory; try model.gradient_checkpointing=true, "
                "a smaller data.max_length, PEFT=qlora, or a smaller MODEL"
            )
        report.say(
            f"out of memory at step {step + 1}: going on with {smaller} x {share // smaller} x 1 instead of "
            f"{job.micro} x {share // job.micro} x 1, the same examples a step"
        )
        job.take_smaller_parts(smaller, share // smaller)


def train_step(job: Job, step: int) -> dict[str, Any]:
    """One optimizer step on the global batch of `step`.

    The gradient is that of the mean over the trained tokens of the whole batch, whatever the number of processes and the
    accumulation: both average over themselves, so each micro-batch's sum is scaled back by world x accumulation.
    """
    started = time.monotonic()
    job.beat.step = step + 1
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
        "peak_bytes": peak_bytes(accelerator.device),
    }


def require_finite(step: int, loss: float, norm: float) -> None:
    """Refuse to go on after a step whose numbers are none; all processes have the same ones and leave together."""
    # DeepSpeed says -1 for a norm that is not finite.
    if not (math.isfinite(loss) and 0 <= norm < math.inf):
        raise UserError(f"step {step}: the training diverged (loss {loss:.4g}); try a smaller optim.lr")


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on its GPU, or of the machine with all libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_batch(job: Job, batch: list[Example], scale: float) -> tuple[torch.Tensor, float]:
    """This process's share of one optimizer step: (its summed loss, the norm of the gradient before clipping)."""
    accelerator = job.accelerator
    total = torch.zeros((), device=accelerator.device)
    norm: Any = None
    for micro in micro_batches(batch, accelerator.process_index, accelerator.num_processes, job.micro):
        job.beat.at("a micro-batch")
        with accelerator.accumulate(job.model):
            loss = job.model(**collate(job.rows(micro), accelerator.device))
            accelerator.backward(loss * scale)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(job.parameters.values(), job.config.optim.clip)
            job.optimizer.step()
            job.optimizer.zero_grad()
            total += loss.detach()
    return total, float(norm if job.stage is None else job.model.get_global_grad_norm())


def end_stopped(job: Job, manifest: dict[str, Any], report: Report, step: int) -> int:
    """Leave a run that was told to stop, with a checkpoint of its last step."""
    if job.saved_step < step and not save_checkpoint(job, step):
        raise UserError(
            f"the disk is full: no checkpoint of step {step}, the last good one is step {job.saved_step}; free some space, "
            "then run the same command again to go on from there"
        )
    if job.accelerator.is_main_process:
        rundir.write_manifest(job.config.run_dir, {**manifest, "state": "stopped"})
    kept = f"after step {step} with a checkpoint" if step else "before the first step, nothing was lost"
    report.say(f"stopped {kept}; run the same command again to go on")
    job.stop.is_leaving = True
    job.accelerator.wait_for_everyone()
    job.accelerator.end_training()
    return EXIT_STOPPED
