"""Measure a finished run on its held-out split, beside its base: loss, exact match, valid JSON."""

import json
import math
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from launcher import data, rundir
from launcher.compose import load
from launcher.errors import UserError
from launcher.loss import Trainee
from launcher.material import Material, load_material
from launcher.measure import answer, fits, has_answer, parts, share, share_exact, summed_loss
from launcher.reload import Reloaded, open_run
from launcher.report import printable
from launcher.variables import parse

BATCH = 40


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
    device = run.model.device
    sums = [summed_loss(Trainee(run.model), part, device) for part in parts(material.held_out, BATCH)]
    nats, tokens = (sum(column) for column in zip(*sums, strict=True))
    asked = [m for m in material.splits.held_out if has_answer(m) and fits(run.tokenizer, m, material.longest)]
    said: list[str] = []
    chunks = [asked[i : i + BATCH] for i in range(0, len(asked), BATCH)]
    for chunk in track(chunks, description=f"{name} answers", console=Console(stderr=True), transient=True):
        said += answer(run.model, run.tokenizer, chunk, run.stop_ids, device)
    right = [messages[-1]["content"] for messages in asked]
    return {
        "loss": round(nats / tokens, 4),
        "perplexity": round(math.exp(nats / tokens), 4),
        "exact_match": share_exact(said, right) if asked else None,
        "valid_json": share(map(is_json, said)) if asked and all(map(is_json, right)) else None,
        "samples": [
            {"asked": m[-2]["content"], "wanted": r, "answered": s} for m, r, s in zip(asked, right, said, strict=True)
        ],
    }


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
