"""What a run will learn from, shown before it learns: counts, and one example with the trained part marked."""

import itertools
from typing import Any

from rich.console import Console
from rich.text import Text

from launcher.config import Data
from launcher.encoding import Example, count_trained
from launcher.material import Material
from launcher.report import printable

MAX_TOKENS = 400
MAX_LEFT_OUT = 5
TREATED = {"truncate": "cut at", "drop": "left out, longer than", "split": "split into parts of"}


def show(console: Console, material: Material, data: Data) -> None:
    """Print the counts and the first training example: trained tokens green, or between ⟦ ⟧ where there is no colour."""
    for line in summary(material, data):
        console.print(line, markup=False, soft_wrap=True)
    console.print(
        marked(material.tokenizer, material.train[0], has_colour=console.is_terminal and not console.no_color)
    )


def summary(material: Material, data: Data) -> list[str]:
    """What there is, how much of it is trained, what was cut or left out, and whether stopping is learned."""
    train, tokenizer = material.train, material.tokenizer
    shapes = ", ".join(f"{count} {shape}" for shape, count in material.splits.shapes.items())
    trained = count_trained(train)
    stop = " or ".join(tokenizer.convert_ids_to_tokens(list(material.stop_ids)))
    lines = [
        f"data: {data.source} ({shapes}): {len(train)} examples to learn from, {len(material.held_out)} held out",
        f"{len(train.ids):,} tokens, {trained / len(train.ids):.0%} of them trained; "
        f"longest {train.lengths.max()} of {material.longest}; {stop} is learned in {material.num_stopping} of {len(train)}",
    ]
    if num_long := train.num_long + material.held_out.num_long:
        lines.append(f"{_count(num_long, 'example')} {TREATED[data.overflow]} {material.longest} tokens")
    if num_empty := train.num_empty + material.held_out.num_empty:
        lines.append(f"{_count(num_empty, 'example')} left out: nothing of them would be trained")
    left_out = material.splits.left_out
    if left_out:
        lines.append(f"{_count(len(left_out), 'record')} left out:")
        lines += [f"  {fault}" for fault in left_out[:MAX_LEFT_OUT]]
        lines += [f"  … and {len(left_out) - MAX_LEFT_OUT} more"] if len(left_out) > MAX_LEFT_OUT else []
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def marked(tokenizer: Any, example: Example, *, has_colour: bool) -> Text:
    """The text of an example as the model sees it, special tokens included, with the trained part marked."""
    pairs = list(zip(example.ids.tolist(), example.trained.tolist(), strict=True))
    text = Text()
    for is_trained, run in itertools.groupby(pairs[:MAX_TOKENS], key=lambda pair: pair[1]):
        piece = printable(tokenizer.decode([i for i, _ in run]))
        style = "green" if is_trained else "dim"
        text.append(piece if has_colour or not is_trained else f"⟦{piece}⟧", style)
    if len(pairs) > MAX_TOKENS:
        text.append(f" … {len(pairs) - MAX_TOKENS} more tokens", "dim")
    return text
