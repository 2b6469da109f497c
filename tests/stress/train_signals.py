"""Tell one process of two to stop, at random moments: both must agree, leave a checkpoint, and exit with 75.

    python -m tests.stress.train_signals [SEED=0] [SIGNALS=20] [LATEST_S=15]

A tiny model on two gloo processes, one run that is stopped and goes on again and again. The first signal and half of the others
come up to LATEST_S after the first step of an attempt, among steps, evaluations and checkpoints; the rest between the start of
the processes and their first step. Prints every moment. Fails unless every signal ends the run with 75 and loses at most one
step, and every attempt goes on from the newest checkpoint.
"""

import random
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from launcher.beat import read_sign
from launcher.errors import EXIT_STOPPED
from launcher.report import read_metrics
from tests.stress.program import begin, finish, run_program
from tests.stress.trainings import kill, newest_step, num_steps, start_training, tiny_model, wait_for

# A run that has not ended after so long never will.
HANGS_S = 120.0


def start(model: Path, run: Path) -> subprocess.Popen[str]:
    """Two processes that train until they are stopped."""
    return start_training(
        model, run, "NGPU=2", "checkpoint.every=20", "eval.every=10", "eval.examples=20", "eval.answers=2"
    )


def ranks(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
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


def last_step(run: Path) -> int:
    """The last step that was written down; 0 without one."""
    return max((record["step"] for record in read_metrics(run)), default=0) if num_steps(run) else 0


class Run:
    """One run of two processes, and the seconds that its first attempt took from its processes to its first step."""

    def __init__(self, model: Path, folder: Path, latest_s: float, draw: random.Random) -> None:
        self.model, self.folder, self.latest_s, self.draw = model, folder, latest_s, draw
        self.first_s = 0.0
        self.in_training = 0

    def stop_once(self, number: int) -> list[str]:
        """Start or resume, signal one process at a random moment, and look at what has become of it; the faults."""
        before, done = newest_step(self.folder), num_steps(self.folder)
        process = start(self.model, self.folder)
        found, rank = ranks(process), self.draw.choice([0, 1])
        name = self.draw.choice(["SIGTERM", "SIGINT", "SIGUSR1"])
        self.wait_for_moment(process, done)
        sign = read_sign(self.folder / f"logs/rank-{rank}.beat")
        sent = time.monotonic()
        found[rank].send_signal(getattr(signal, name))
        said, is_hung = end(process)
        has_stepped = num_steps(self.folder) > done
        self.in_training += has_stepped
        lost = last_step(self.folder) - newest_step(self.folder)
        print(
            f"{number:3}  {name} to rank {rank} ({sign.doing if sign else 'before it had begun'}): exit {process.returncode} "
            f"after {time.monotonic() - sent:.1f} s, {lost} steps lost",
            flush=True,
        )
        faults = [f"still running after {HANGS_S:.0f} s"] if is_hung else []
        faults += [f"exit {process.returncode}"] if process.returncode != EXIT_STOPPED else []
        faults += [f"{lost} steps lost"] if lost > 1 else []
        resumed = re.search(r"^resumed after step (\d+)", said, re.MULTILINE)
        went_on = int(resumed[1]) if resumed else 0
        faults += [f"went on after {went_on} and not {before}"] if has_stepped and went_on != before else []
        return [f"signal {number}: {fault}\n{said}" for fault in faults]

    def wait_for_moment(self, process: subprocess.Popen[str], done: int) -> None:
        """Wait until a random moment of an attempt."""
        is_early = self.draw.random() < 0.5
        if self.first_s and is_early:
            time.sleep(self.draw.uniform(0, self.first_s))
            return
        seconds = wait_for(process, lambda: num_steps(self.folder) > done)
        self.first_s = self.first_s or seconds
        time.sleep(self.draw.uniform(0, self.latest_s))


def end(process: subprocess.Popen[str]) -> tuple[str, bool]:
    """Wait for the end of a run: (its output, True if it had to be killed)."""
    try:
        return process.communicate(timeout=HANGS_S)[0], False
    except subprocess.TimeoutExpired:
        kill(process)
        return process.communicate()[0], True


def main(args: list[str]) -> int:
    """Stop and resume one run so many times."""
    own, _ = begin(args, SIGNALS="20", LATEST_S="15")
    with tempfile.TemporaryDirectory() as name:
        run = Run(tiny_model(name), Path(name, "run"), float(own["LATEST_S"]), random.Random(int(own["SEED"])))
        faults = [fault for number in range(1, int(own["SIGNALS"]) + 1) for fault in run.stop_once(number)]
        return finish(
            faults, f"{own['SIGNALS']} signals, {run.in_training} of them after a step; step {last_step(run.folder)}"
        )


if __name__ == "__main__":
    run_program(main)
