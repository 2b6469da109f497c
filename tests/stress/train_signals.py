"""Tell one process of two to stop, at random moments: all must agree, leave a checkpoint, and exit with 75.

    python -m bench.signals [SIGNALS=20] [SEED=0]

A tiny model on two gloo processes. The moments are spread from the start of the processes on: loading, evaluations, steps
and checkpoints. Prints the seed and every moment. Exit code 1 unless every one stopped in time and lost at most one step.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench.moments import begin, tiny_model
from launcher import checkpoint
from launcher.beat import read_sign
from launcher.errors import EXIT_STOPPED
from launcher.report import METRICS, read_metrics
from launcher.variables import ROOT

LATEST_S = 25.0
PATIENCE_S = 30.0


def start(model: Path, run: Path) -> subprocess.Popen[str]:
    """Two processes that train until they are stopped."""
    args = [
        f"MODEL={model}", f"RUN={run}", "NGPU=2", "data.limit=64", "batch.size=8", "model.dtype=fp32", "optim.epochs=100000",
        "checkpoint.every=20", "eval.every=10", "eval.examples=20", "eval.answers=2",
    ]  # fmt: skip
    command = [sys.executable, "-m", "launcher", "train", *args]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def workers(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The training processes by rank, as soon as both are there."""
    while process.poll() is None:
        found = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                found[int(child.environ()["RANK"])] = child
            except (KeyError, psutil.Error):
                continue
        if len(found) == 2:
            return found
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def stop_once(model: Path, run: Path, draw: random.Random, number: int) -> bool:
    """Start or resume the run, signal one process at a random moment, and tell what became of it: whether all was well."""
    process = start(model, run)
    ranks = workers(process)
    delay, rank = draw.uniform(0, LATEST_S), draw.choice([0, 1])
    name = draw.choice(["SIGTERM", "SIGINT", "SIGUSR1"]) if number % 2 else "SIGTERM"
    time.sleep(delay)
    sign = read_sign(run / f"logs/rank-{rank}.beat")
    sent = time.monotonic()
    ranks[rank].send_signal(getattr(signal, name))
    try:
        said, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    took = time.monotonic() - sent
    done = read_metrics(run) if (run / METRICS).exists() else []
    newest, _ = checkpoint.newest(run)
    lost = (done[-1]["step"] if done else 0) - (newest.step if newest else 0)
    is_good = process.returncode == EXIT_STOPPED and lost <= 1 and took < PATIENCE_S
    print(
        f"{number:3}  {name} to rank {rank} after {delay:.2f} s ({sign.doing if sign else 'before it had begun'}): "
        f"exit {process.returncode} after {took:.1f} s, {lost} steps lost{'' if is_good else chr(10) + said}",
        flush=True,
    )
    return is_good


def main(args: list[str]) -> int:
    """Stop and resume one run so many times."""
    count, draw = begin(args, "SIGNALS", 20)
    with tempfile.TemporaryDirectory() as folder:
        model, run = tiny_model(folder), Path(folder, "run")
        good = sum(stop_once(model, run, draw, number) for number in range(1, count + 1))
    print(f"{good} of {count} stopped in time with exit {EXIT_STOPPED} and at most one step lost")
    return int(good != count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
