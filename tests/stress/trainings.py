"""Trainings of a tiny model in processes of their own, for the programs that kill, stop or compare them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launcher.report import METRICS
from launcher.variables import ROOT

COMMON = ("data.limit=64", "batch.size=8", "model.dtype=fp32", "optim.lr=1e-2", "optim.epochs=100000", "eval.answers=0")


def tiny_model(folder: str) -> Path:
    """A tiny Llama in a folder of its own."""
    from tests.conftest import write_tiny

    model = Path(folder, "model")
    model.mkdir()
    return write_tiny("llama", model)


def start_training(model: Path, run: Path, *options: str) -> subprocess.Popen[str]:
    """`launcher train` as a user starts it, in a process group of its own; what it says goes to one pipe."""
    command = [sys.executable, "-m", "launcher", "train", f"MODEL={model}", f"RUN={run}", *COMMON, *options]
    return subprocess.Popen(
        command, cwd=ROOT, process_group=0, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def train(model: Path, run: Path, *options: str) -> None:
    """Train to the end."""
    said, _ = (process := start_training(model, run, *options)).communicate()
    assert process.returncode == 0, said


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a training outright, with all its processes."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def num_steps(run: Path) -> int:
    """Steps that all attempts together have written down, those that were done twice included."""
    path = run / METRICS
    return path.read_bytes().count(b'{"step": ') if path.exists() else 0


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint that has its final name; 0 without one."""
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*[0-9]")), default=0)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> float:
    """Wait until it holds or the training has ended; the seconds that took."""
    begun = time.monotonic()
    while process.poll() is None and not condition():
        time.sleep(0.01)
    return time.monotonic() - begun
