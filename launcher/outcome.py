"""What a run leaves behind and says: the manifest, the adapter, the first and the last lines."""

import gc
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from launcher import checkpoint, gate, methods, models, preview, rundir, shards
from launcher.batches import each_alone, padding_share
from launcher.held_out import Evaluation, answered, mean_loss, part
from launcher.job import Job, gather_state, sample_micros
from launcher.plan import notes
from launcher.reload import load_adapter, swap_adapter
from launcher.report import Report, read_evaluations, read_metrics
from launcher.rundir import ADAPTER_FILE
from launcher.variables import ROOT

PROBE_LENGTH = 256
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "datasets")


def save_adapter(job: Job) -> None:
    """Write `adapter/` (fp32) and `tokenizer/`; every process must call this together.

    The adapter is written under another name, read back and held against what was trained. Raises `IntegrityError`.
    """
    job.beat.at("the adapter")
    state = gather_state(job)
    with shards.gathered(job.parameters.values()):
        if job.accelerator.is_main_process:
            _write_adapter(job, state)
    job.accelerator.wait_for_everyone()


def _write_adapter(job: Job, state: dict[str, torch.Tensor]) -> None:
    run_dir, peft_model = job.config.run_dir, job.peft_model
    peft_model.peft_config["default"].base_model_name_or_path = job.card.hub or str(job.weights.path)
    # The fp32 masters: an engine may compute with rounded copies.
    for name, parameter in methods.trainable(peft_model).items():
        parameter.data = state[f"param/model.{name}"].to(parameter.device)
    part = run_dir / "adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    with models.quiet():
        methods.save(peft_model, part)
    idle = {methods.saved_name(name.removeprefix("param/model.")) for name in checkpoint.idle(state)}
    gate.check_file(part / ADAPTER_FILE, methods.saved_tensors(peft_model), job.start, idle)
    for file in part.iterdir():
        rundir.sync(file)
    shutil.rmtree(run_dir / "adapter", ignore_errors=True)
    part.rename(run_dir / "adapter")
    job.tokenizer.save_pretrained(run_dir / "tokenizer")


def conclude(job: Job, report: Report, step: int) -> dict[str, Any] | None:
    """Measure, save, and let the reloaded adapter answer; the results for the manifest, over the whole held-out split.

    None if the processes agreed to stop while they measured.
    """
    job.model.eval()
    chosen, everything = part(job.config, job.material), range(len(job.material.held_out))
    part_loss, whole_loss = mean_loss(job, chosen), mean_loss(job, everything)
    if part_loss is None or whole_loss is None:
        return None
    last, whole = Evaluation(step, part_loss, len(chosen)), Evaluation(step, whole_loss, len(everything))
    save_adapter(job)
    reloaded, difference = check_reloaded(job)
    if reloaded is not None:
        last = answered(job, last, reloaded)
    # The same part as before, so that the evaluations of a run make one curve.
    report.evaluation(last)
    report.say(f"over all {whole.examples} held-out examples: loss {whole.loss:.4f}, perplexity {whole.perplexity:.4g}")
    results = {"loss": whole.loss, "perplexity": whole.perplexity, "examples": whole.examples}
    return {**last.record(), **results, "reload_difference": difference}


def check_reloaded(job: Job) -> tuple[Any, float]:
    """Put the saved adapter on a fresh base and compare its logits with those of the live model, which is given up.

    Returns the reloaded model and the largest difference (see `gate.check_logits`). Every process must call this
    together; all but the first get (None, 0). A base that is sharded fits into no process: there the saved adapter takes
    the place of the trained one on the same base, in all of them.
    """
    job.beat.at("reading the adapter back")
    if job.is_base_sharded:
        live = probe(job, job.peft_model)
        model = swap_adapter(job.peft_model, job.config.run_dir / "adapter")
        return model, gate.check_logits(live, probe(job, model), job.dtype)
    live = probe(job, job.peft_model) if job.accelerator.is_main_process else None
    # Two bases at once may be one too many for the memory.
    job.model = job.optimizer = None
    job.parameters.clear()
    job.accelerator.free_memory()
    # It collects before it lets go of its own references, and what wraps a model refers to itself.
    gc.collect()
    torch.cuda.empty_cache()
    if live is None:
        return None, 0.0
    base = models.load_base(job.weights.path, job.dtype, job.config.quant, job.accelerator.device)
    model = load_adapter(base, job.config.run_dir / "adapter")
    return model, gate.check_logits(live, probe(job, model), job.dtype)


@torch.no_grad()
def probe(job: Job, model: Any) -> torch.Tensor:
    """fp32 logits [1, L, vocabulary] of the first held-out example."""
    ids = torch.from_numpy(job.material.held_out[0].ids[:PROBE_LENGTH].astype("int64"))[None]
    with job.accelerator.autocast():
        return model.eval()(input_ids=ids.to(job.accelerator.device)).logits.float().cpu()


def describe(job: Job, command: str) -> dict[str, Any]:
    """The manifest of a run that has just begun: what the daemon, an evaluation or a repetition needs to know."""
    config = job.config
    return {
        "format": rundir.FORMAT,
        "state": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "config": config.model_dump(mode="json"),
        "base": {
            "name": config.model.name,
            "id": job.weights.id,
            "revision": job.weights.revision,
            "digest": job.weights.digest,
            "dtype": job.dtype,
            "quantisation": config.quant.type if config.quant.bits else None,
        },
        "data": job.material.splits.fingerprint,
        "system": job.material.splits.system,
        "template": job.tokenizer.chat_template,
        "template_sha256": rundir.text_digest(job.tokenizer.chat_template),
        "stop_ids": list(job.material.stop_ids),
        "training": {
            "strategy": job.strategy,
            "engine": type(job.model).__name__,
            "world_size": job.accelerator.num_processes,
            "micro_batch": job.micro,
            "accumulation": job.accelerator.gradient_accumulation_steps,
            "steps": job.steps,
            "train_examples": len(job.material.train),
            "held_out_examples": len(job.material.held_out),
            "packing": job.is_packed,
            "trained_parameters": job.num_trained,
            "frozen_held": sum(shards.num_held(p) for p in job.peft_model.parameters() if not p.requires_grad),
        },
        "versions": {"python": sys.version.split()[0], **{name: metadata.version(name) for name in PACKAGES}},
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """The commit of this checkout, with `+changes` where files differ from it; None outside a repository."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()


def announce(job: Job, report: Report, step: int) -> None:
    """The first lines of a run."""
    config, world = job.config, job.accelerator.num_processes
    batch = f"{job.micro} x {job.accelerator.gradient_accumulation_steps} x {world}"
    report.say(
        f"{config.model.name} + {config.adapter.method}: {job.num_trained:,} trained parameters -> {config.run_dir}"
    )
    report.say(f"{job.steps} steps of {config.batch.size} examples ({batch}), strategy {job.strategy}, {packing(job)}")
    work = report.pace.effort
    report.say(
        f"{work.learning + work.measuring:,} tokens in all: {work.learning:,} to learn from, {work.measuring:,} to measure with"
    )
    for note in notes(config, on_gpu=job.accelerator.device.type == "cuda"):
        report.say(f"note: {note}")
    preview.show(report.console, job.material, config.data)
    if step:
        report.say(f"resumed after step {step} of {job.steps}")


def packing(job: Job) -> str:
    """How the examples of the first steps lie in their batches."""
    micros = sample_micros(job)
    padded = padding_share([each_alone(m) for m in micros])
    if not job.is_packed:
        return f"padded by {padded:.0%}"
    return f"packed: {padding_share([job.rows(m) for m in micros]):.0%} padding instead of {padded:.0%}"


def finish(job: Job, manifest: dict[str, Any], results: dict[str, Any]) -> None:
    """Mark the run finished and say what to do next."""
    # It brings matplotlib, which nothing needs before.
    from launcher.plots import Curve, draw_loss

    run_dir = job.config.run_dir
    training, held_out = read_metrics(run_dir), read_evaluations(run_dir)
    points = [[(record["step"], record["loss"]) for record in records] for records in (training, held_out)]
    draw_loss(Curve(*points), run_dir)
    # Of the first attempt, if there were several.
    start = held_out[0]
    rundir.write_manifest(run_dir, {**manifest, "state": "finished", "results": {"start": start, **results}})
    name = rundir.make_argument(run_dir)
    print(f"\nsaved to {run_dir}, read back and equal, {results['wall_s']:.0f} s in all. Next:")
    print(f"  make chat{name}    talk to it\n  make eval{name}    compare it with the base")
