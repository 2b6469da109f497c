"""Faults planted in one process of several: a `sitecustomize` that the interpreter of every process runs first."""

import os
from pathlib import Path

from launcher.variables import ROOT

# Runs a fault when the process of that rank makes its `at`-th batch, or the one that is alone where rank is None; `launcher.batches` is light enough to import here.
PROGRAM = """
import os
if os.environ.get("RANK") == {rank!r} and os.environ.get("AFINAR_ATTEMPT", "0") == "0":
    from launcher import batches
    collate, calls = batches.collate, [0]
    def planted(*args, **rest):
        calls[0] += 1
        if calls[0] == {at}:
            {fault}
        return collate(*args, **rest)
    batches.collate = planted
"""


def planted(folder: Path, fault: str, *, rank: int | None, at: int) -> dict[str, str]:
    """The environment in which that process meets the fault."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        PROGRAM.format(rank=None if rank is None else str(rank), at=at, fault=fault)
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
