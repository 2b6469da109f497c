"""Kill a training outright at random moments, resume it, and compare what it leaves with an uninterrupted run.

    python -m bench.kills [KILLS=50] [SEED=0]

A tiny model in one process on the CPU, with a checkpoint after every step, so that many moments fall into a save. Prints the
seed and every moment. Exit code 1 unless every attempt went on and every finished adapter equals the reference to the bit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.moments import begin, tiny_model
from launcher.report import METRICS
from launcher.variables import ROOT

ADAPTER = "adapter/adapter_model.safetensors"
STEPS = 60
# As a share of the kills: before the first step of an attempt, while libraries and weights are loaded.
EARLY = 0.2
LATEST_S = 3.0


def start(model: Path, run: Path) -> subprocess.Popen[str]:
    """The training, in a process group of its own."""
    args = [
        f"MODEL={model}", f"RUN={run}", "data.limit=64", "batch.size=8", "model.dtype=fp32", "optim.lr=1e-2",
        "optim.epochs=100", f"optim.max_steps={STEPS}", "checkpoint.every=1", "eval.examples=1", "eval.answers=0",
    ]  # fmt: skip
    command = [sys.executable, "-m", "launcher", "train", *args]
    return subprocess.Popen(
        command, cwd=ROOT, process_group=0, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_training(process: subprocess.Popen[str], metrics: Path, lines: int) -> None:
    """Until this attempt has written its first step, or has ended."""
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > lines + 1):
        time.sleep(0.01)


def attempt(model: Path, run: Path, draw: random.Random) -> tuple[str, str]:
    """Start or resume, and kill at a random moment: (what became of it, what it said)."""
    metrics = run / METRICS
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    process = start(model, run)
    if draw.random() < EARLY:
        delay, where = draw.uniform(0, 8.0), "early"
    else:
        wait_for_training(process, metrics, lines)
        delay, where = draw.uniform(0, LATEST_S), "training"
    time.sleep(delay)
    is_saving = any(run.glob("**/*.part"))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    said, _ = process.communicate()
    if process.returncode == -signal.SIGKILL and read_manifest(run).get("state") == "finished":
        return "finished, then killed", said
    if process.returncode == -signal.SIGKILL:
        return f"killed {delay:.3f} s into {where}{', in a save' if is_saving else ''}", said
    return ("finished" if process.returncode == 0 else f"FAILED with {process.returncode}"), said


def read_manifest(run: Path) -> dict[str, Any]:
    """run.json, empty where the kill came before it."""
    return json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}


def main(args: list[str]) -> int:
    """Run until so many kills have happened and the run they hit is finished."""
    kills, draw = begin(args, "KILLS", 50)
    with tempfile.TemporaryDirectory() as folder:
        model, whole = tiny_model(folder), Path(folder, "whole")
        said, _ = (process := start(model, whole)).communicate()
        assert process.returncode == 0, said
        reference = (whole / ADAPTER).read_bytes()
        done = saves = finished = equal = failed = 0
        run = Path(folder, "run-0")
        while done < kills or run.exists():
            if done < kills:
                became, said = attempt(model, run, draw)
            else:
                said, _ = (process := start(model, run)).communicate()
                became = "finished" if process.returncode == 0 else f"FAILED with {process.returncode}"
            resumed = next((line for line in said.splitlines() if line.startswith("resumed")), "from the start")
            print(f"{done + ('killed' in became):3}  {became}; {resumed}", flush=True)
            done, saves = done + ("killed" in became), saves + ("in a save" in became)
            if became.startswith("finished"):
                finished, equal = finished + 1, equal + ((run / ADAPTER).read_bytes() == reference)
                run = Path(folder, f"run-{finished}")
            elif became.startswith("FAILED"):
                print(said)
                failed += 1
                run = Path(folder, f"run-failed-{failed}")
    print(
        f"{done - failed} of {done} kills resumed ({saves} of them in a save); {equal} of {finished} finished runs are "
        "bit-identical to the uninterrupted one"
    )
    return int(failed > 0 or equal != finished or not finished)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
