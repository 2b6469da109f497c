"""What a run leaves behind and says: the manifest, the adapter, the first and the last lines."""

import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from launcher import methods, models, rundir
from launcher.chat import prompt_ids, stop_ids
from launcher.job import Job, gather_state
from launcher.plan import notes
from launcher.report import Report, draw_loss
from launcher.variables import ROOT

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "datasets")


def save_adapter(job: Job) -> None:
    """Write `adapter/` (fp32) and `tokenizer/`, then read the adapter file back and check every tensor."""
    state = gather_state(job)
    if not job.accelerator.is_main_process:
        return
    peft_model = job.accelerator.unwrap_model(job.model).model
    tensors = {name.removeprefix("param/model."): t for name, t in state.items() if name.startswith("param/")}
    peft_model.peft_config["default"].base_model_name_or_path = job.card.hub or str(job.weights.path)
    folder = job.config.run_dir / "adapter"
    with models.quiet():
        peft_model.save_pretrained(folder, state_dict=tensors)
    methods.check_folder(peft_model, folder)
    job.tokenizer.save_pretrained(job.config.run_dir / "tokenizer")


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
            "dtype": job.dtype,
            "quantisation": config.quant.type if config.quant.bits else None,
        },
        "data": job.splits.fingerprint,
        "template": job.tokenizer.chat_template,
        "stop_ids": stop_ids(job.tokenizer),
        "training": {
            "strategy": job.strategy,
            "engine": type(job.model).__name__,
            "world_size": job.accelerator.num_processes,
            "micro_batch": job.micro,
            "accumulation": job.accelerator.gradient_accumulation_steps,
            "steps": job.steps,
            "train_examples": len(job.train),
            "held_out_examples": len(job.held_out),
            "trained_parameters": sum(p.numel() for p in job.parameters.values()),
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
    trained = sum(parameter.numel() for parameter in job.parameters.values())
    batch = f"{job.micro} x {job.accelerator.gradient_accumulation_steps} x {world}"
    report.say(f"{config.model.name} + {config.adapter.method}: {trained:,} trained parameters -> {config.run_dir}")
    report.say(
        f"{len(job.train)} examples, {job.steps} steps of {config.batch.size} ({batch}), strategy {job.strategy}"
    )
    for note in notes(config, on_gpu=job.accelerator.device.type == "cuda"):
        report.say(f"note: {note}")
    if step:
        report.say(f"resumed after step {step} of {job.steps}")


def finish(job: Job, manifest: dict[str, Any], results: dict[str, Any]) -> None:
    """Mark the run finished, show one answer it can give now, and say what to do next."""
    run_dir = job.config.run_dir
    rundir.write_manifest(run_dir, {**manifest, "state": "finished", "results": results})
    draw_loss(run_dir)
    question, answer = sample(job)
    name = rundir.make_argument(run_dir)
    print(f"\nheld-out loss {results['held_out_loss']:.4f} nats a token, {results['wall_s']:.0f} s in all")
    print(f"asked:    {question}\nanswered: {answer}\n")
    print(f"saved to {run_dir}. Next:\n  make chat{name}    talk to it\n  make eval{name}    compare it with the base")


@torch.no_grad()
def sample(job: Job) -> tuple[str, str]:
    """The first held-out question and the tuned model's greedy answer to it."""
    messages = job.splits.held_out[0][:-1]
    model = job.accelerator.unwrap_model(job.model).model.eval()
    ids = torch.tensor([prompt_ids(job.tokenizer, messages)], device=job.accelerator.device)
    room = min(96, models.context_length(job.weights.path) - ids.shape[1])
    with models.quiet(), job.accelerator.autocast():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
            eos_token_id=stop_ids(job.tokenizer), pad_token_id=0,
        )  # fmt: skip
    return messages[-1]["content"], job.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
