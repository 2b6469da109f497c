"""Measure a finished run on its held-out split, beside its base: loss, exact match, valid JSON."""

import json
import math
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from launcher import data, rundir
from launcher.compose import load
from launcher.errors import UserError
from launcher.loss import Trainee
from launcher.material import Material, load_material
from launcher.measure import Said, answer, fits, foreseen, has_answer, read, share, share_exact
from launcher.reload import Reloaded, open_run
from launcher.report import printable
from launcher.variables import parse

BATCH = 40
# Answers that are written out, right or wrong, for people to read.
NUM_SHOWN = 8
PARTIAL = "\ufffd"  # what a part of a character is decoded to


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
    material = load_material(run.config, splits, run_dir / "tokenizer", run.context)
    tuned = examine("tuned", run, material)
    with run.untuned() as base:
        untuned = examine("base", base, material)
    results = {"run": str(run_dir), "examples": len(splits.held_out), "base": untuned, "tuned": tuned}
    rundir.write_atomically(run_dir / "eval.json", (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
    show(results)
    print(f"saved to {run_dir / 'eval.json'}. Next: make chat{rundir.make_argument(run_dir)}")
    return 0


def examine(name: str, run: Reloaded, material: Material) -> dict[str, Any]:
    """Loss in nats a trained token; share of greedy last answers that are exact, and that are valid JSON where asked."""
    held_out, conversations = material.held_out, material.splits.held_out
    readings = read(Trainee(run.model), held_out, BATCH, run.model.device)
    loss = float(np.concatenate([reading.losses for reading in readings]).mean(dtype=np.float64))
    asked = [i for i, m in enumerate(conversations) if has_answer(m) and fits(run.tokenizer, m, material.longest)]
    right = [conversations[i][-1]["content"] for i in asked]
    # Where examples were cut or left out, they are not the conversations one for one.
    is_read = not (held_out.num_long or held_out.num_empty)
    said = [
        foreseen(run.tokenizer, held_out[i], readings[i], run.stop_ids) if is_read else Said("", False) for i in asked
    ]
    wanted = [n for n, s in enumerate(said) if not s.is_whole and (n < NUM_SHOWN or is_undecided(s.text, right[n]))]
    chunks = [wanted[i : i + BATCH] for i in range(0, len(wanted), BATCH)]
    for chunk in track(chunks, description=f"{name} answers", console=Console(stderr=True), transient=True):
        questions = [conversations[asked[n]] for n in chunk]
        texts = answer(run.model, run.tokenizer, questions, run.stop_ids, run.model.device)
        for n, text in zip(chunk, texts, strict=True):
            said[n] = Said(text, True)
    texts = [s.text for s in said]
    return {
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 4),
        "exact_match": share_exact(texts, right) if asked else None,
        "valid_json": share(map(is_json, texts)) if asked and all(map(is_json, right)) else None,
        "samples": [
            {"asked": conversations[i][-2]["content"], "wanted": r, "answered": s.text, "is_whole": s.is_whole}
            for i, r, s in zip(asked, right, said, strict=True)
        ],
    }


def is_undecided(beginning: str, right: str) -> bool:
    """Whether an answer that begins so may still be the right one, or JSON."""
    text = beginning.strip().rstrip(PARTIAL)
    return right.strip().startswith(text) or text[:1] in ("{", "[")


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
    table.add_row("perplexity", f"{base['perplexity']:.4g}", f"{tuned['perplexity']:.4g}")
    if base["exact_match"] is not None:
        table.add_row("exact match", f"{base['exact_match']:.1%}", f"{tuned['exact_match']:.1%}")
    if base["valid_json"] is not None:
        table.add_row("valid JSON", f"{base['valid_json']:.1%}", f"{tuned['valid_json']:.1%}")
    console = Console(highlight=False)
    console.print(table)
    if not base["samples"]:
        return
    first, untuned = tuned["samples"][0], base["samples"][0]
    for name, text in (("asked", first["asked"]), ("base", untuned["answered"]), ("tuned", first["answered"])):
        console.print(f"{name + ':':6} {printable(text)}", markup=False)
