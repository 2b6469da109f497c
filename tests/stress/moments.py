"""What the benchmarks of random moments begin with: how many, drawn from which seed, on which model."""

import random
from pathlib import Path

from tests.conftest import write_tiny


def begin(args: list[str], name: str, default: int) -> tuple[int, random.Random]:
    """(how many moments `NAME=n` asks for, where they are drawn from); the seed is told."""
    given = dict(arg.split("=", 1) for arg in args)
    count, seed = int(given.get(name, default)), int(given.get("SEED", "0"))
    print(f"seed {seed}, {count} {name.lower()}", flush=True)
    return count, random.Random(seed)


def tiny_model(folder: str) -> Path:
    """A tiny Llama in a folder of its own."""
    model = Path(folder, "model")
    model.mkdir()
    return write_tiny("llama", model)
