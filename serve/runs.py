"""The folders of runs: what a name means, and which of them can be served. Standard library only."""

import json
import os
from pathlib import Path

from serve.engine import BASE
from serve.errors import UserError, nearest

RUNS = Path("runs")


def locate(run: str) -> str:
    """A folder as it was given; a bare name means `runs/<name>`, unless only the current folder has it.

    Raises `UserError` for a name that no run can have.
    """
    path = Path(run.rstrip("/") or run)
    is_bare = len(path.parts) == 1 and run == path.name
    if is_bare and ((RUNS / path).exists() or not path.exists()):
        path = RUNS / path
    return check_name(str(path) if path.name else str(path.resolve()))


def check_name(run: str) -> str:
    """The same folder; raises `UserError` for a name that means something else to who asks for an answer."""
    if Path(run).name == BASE:
        raise UserError(f"{run}: {BASE} is what the model without an adapter is called; rename the folder")
    return run


def check_finished(run: str) -> None:
    """Raise `UserError` unless the folder is a run that can be served."""
    manifest = Path(run) / "run.json"
    if not manifest.is_file():
        others = finished_runs(Path(run).parent)
        hint = f"{nearest(run, others)} Or train one: make train" if others else "train it first: make train"
        raise UserError(f"{run} is not a run; {hint}")
    fields = _read(manifest)
    if fields.get("state") != "finished":
        again = f"{fields['command']}   or begin another: " if "command" in fields else ""
        state = fields.get("state", "no run.json to read")
        raise UserError(f"{run} is not finished ({state}); finish it with: {again}make train")


def finished_runs(folder: Path) -> list[str]:
    """The runs in a folder that can be served."""
    manifests = sorted(folder.glob("*/run.json"))
    return [str(path.parent) for path in manifests if _read(path).get("state") == "finished"]


def only_run() -> str:
    """The one finished run that there is; raises `UserError` if there are several or none."""
    runs = finished_runs(RUNS)
    if not runs:
        raise UserError(f"there is no finished run in {RUNS}{os.sep} yet; train one: make train")
    if len(runs) > 1:
        raise UserError(f"which run? Try RUN={runs[0]}; there are: {', '.join(runs)}")
    return check_name(runs[0])


def _read(manifest: Path) -> dict[str, str]:
    try:
        fields = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
