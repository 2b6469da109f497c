"""Measure a finished run on its held-out split, beside its base: loss, exact match, valid JSON."""

import json
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from launcher import data, models, rundir
from launcher.chat import Message, prompt_ids
from launcher.config import load
from launcher.encoding import encode
from launcher.errors import UserError
from launcher.loss import Trainee, summed
from launcher.reload import Reloaded, open_run
from launcher.variables import parse

BATCH = 40
# Room beyond the longest right answer: an answer that needs more is wrong anyway.
MARGIN = 16


def main(args: list[str]) -> int:
    """`make eval [RUN=…]`: print a table and write eval.json into the run folder."""
    given = parse(args)
    if given.data or given.ngpu or given.strategy or given.overrides:
        raise UserError(
            "an evaluation measures a run as it was trained; name it by RUN=, or by PEFT= and MODEL=, alone"
        )
    run_dir = load(given).run_dir
    # Base and adapter side by side, so that the base can be measured by switching the adapter off.
    run = open_run(run_dir, "adapters", "auto")
    splits = data.read(run.config.data)
    splits.require(run.data, run.config.data.source)
    held_out = splits.held_out
    tuned = measure("tuned", run, held_out)
    with run.model.disable_adapter():
        untuned = measure("base", run, held_out)
    results = {"run": str(run_dir), "examples": len(held_out), "base": untuned, "tuned": tuned}
    rundir.write_atomically(run_dir / "eval.json", (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
    show(results)
    print(f"saved to {run_dir / 'eval.json'}. Next: make chat{rundir.make_argument(run_dir)}")
    return 0


@torch.no_grad()
def measure(name: str, run: Reloaded, held_out: list[list[Message]]) -> dict[str, Any]:
    """Loss in nats a trained token; share of greedy last answers that are exact, and that are valid JSON where asked."""
    answers = [messages[-1]["content"] for messages in held_out]
    longest = max(len(run.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers)
    said: list[str] = []
    chunks = [held_out[i : i + BATCH] for i in range(0, len(held_out), BATCH)]
    for chunk in track(chunks, description=f"{name} answers", console=Console(stderr=True), transient=True):
        prompts = [prompt_ids(run.tokenizer, messages[:-1]) for messages in chunk]
        said += generate(run, prompts, longest + MARGIN)
    examples = encode(run.tokenizer, held_out, run.config.data.max_length)
    nats, tokens = summed(Trainee(run.model), examples, BATCH, run.model.device)
    return {
        "loss": round(nats / tokens, 4),
        "exact_match": share(a.strip() == b.strip() for a, b in zip(said, answers, strict=True)),
        "valid_json": share(map(is_json, said)) if all(map(is_json, answers)) else None,
        "samples": [
            {"asked": m[-2]["content"], "wanted": a, "answered": s}
            for m, a, s in zip(held_out, answers, said, strict=True)
        ],
    }


def generate(run: Reloaded, prompts: list[list[int]], max_tokens: int) -> list[str]:
    """Greedy answers to a left-padded batch of prompts."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    max_tokens = min(max_tokens, run.module.config.max_position_embeddings - length)
    with models.quiet():
        out = run.model.generate(
            input_ids=ids.to(run.model.device), attention_mask=mask.to(run.model.device), max_new_tokens=max_tokens,
            do_sample=False, eos_token_id=list(run.stop_ids), pad_token_id=run.stop_ids[0],
        )  # fmt: skip
    return run.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)


def share(values: Any) -> float:
    """The share of true values, to four digits."""
    values = list(values)
    return round(sum(values) / len(values), 4)


def is_json(text: str) -> bool:
    """Whether the whole text is one JSON object or array."""
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False


def show(results: dict[str, Any]) -> None:
    """The table: base and tuned side by side, and one answer of each."""
    base, tuned = results["base"], results["tuned"]
    table = Table(title=f"{results['run']}: {results['examples']} held-out examples")
    for column in ("", "base", "tuned"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("loss (nats a token)", f"{base['loss']:.4f}", f"{tuned['loss']:.4f}")
    table.add_row("exact match", f"{base['exact_match']:.1%}", f"{tuned['exact_match']:.1%}")
    if base["valid_json"] is not None:
        table.add_row("valid JSON", f"{base['valid_json']:.1%}", f"{tuned['valid_json']:.1%}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"asked: {base['samples'][0]['asked']}", markup=False)
    console.print(f"base:  {base['samples'][0]['answered']!r}", markup=False)
    console.print(f"tuned: {tuned['samples'][0]['answered']}", markup=False)
