"""Kill a training outright at random moments, resume it, and compare what it leaves with an uninterrupted run.

    python -m tests.stress.train_kills [SEED=0] [KILLS=50] [STEPS=60]

A tiny model in one process on the CPU, with a checkpoint after every step, so that many moments fall into a save. One kill in five
comes before the first step of an attempt, one in five after the last; how long each part takes is measured in the uninterrupted run.
Prints every moment. Fails unless every attempt goes on from the newest checkpoint and every finished adapter equals the
uninterrupted one to the bit.
"""

import json
import random
import re
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.stress.program import begin, finish, run_program
from tests.stress.trainings import kill, newest_step, num_steps, start_training, tiny_model, wait_for

ADAPTER = "adapter/adapter_model.safetensors"
# As shares of the kills: before the first step of an attempt, while libraries and weights are loaded; and while the end is written.
EARLY, LATE = 0.2, 0.2


@dataclass(frozen=True)
class Usual:
    """An uninterrupted run: seconds to its first step, of one step, and from the last one to the end; its adapter."""

    first_s: float
    step_s: float
    finish_s: float
    adapter: bytes


@dataclass
class Tally:
    """The kills so far, those that hit a save, attempts that went on from a checkpoint, finished runs, and the faults."""

    killed: int = 0
    in_save: int = 0
    resumed: int = 0
    finished: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """A tiny model, a folder for its runs, and how many steps each has."""

    model: Path
    folder: Path
    steps: int

    def start(self, run: Path) -> subprocess.Popen[str]:
        """Start or resume a run."""
        return start_training(self.model, run, f"optim.max_steps={self.steps}", "checkpoint.every=1", "eval.examples=1")

    def uninterrupted(self) -> Usual:
        """One run from its beginning to its end."""
        process = self.start(run := self.folder / "whole")
        first_s = wait_for(process, lambda: num_steps(run) > 0)
        steps_s = wait_for(process, lambda: num_steps(run) >= self.steps)
        finish_s = wait_for(process, lambda: False)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        return Usual(first_s, steps_s / self.steps, finish_s, (run / ADAPTER).read_bytes())

    def wait_for_moment(self, process: subprocess.Popen[str], run: Path, usual: Usual, draw: random.Random) -> str:
        """Wait until a random moment of an attempt; its name."""
        left, done, share = self.steps - newest_step(run), num_steps(run), draw.random()
        if share < EARLY:
            delay, where = draw.uniform(0, usual.first_s), "the start"
        else:
            wait_for(process, lambda: num_steps(run) > done)
            is_late = share > 1 - LATE
            delay = (
                left * usual.step_s + draw.uniform(0, usual.finish_s)
                if is_late
                else draw.uniform(0, left * usual.step_s)
            )
            where = "its steps and its end"
        time.sleep(delay)
        return f"{delay:.3f} s into {where}"

    def attempt(self, run: Path, usual: Usual, draw: random.Random | None, tally: Tally) -> None:
        """Start or resume a run, kill it if `draw` says when, and look at what has become of it."""
        before, done = newest_step(run), num_steps(run)
        process, moment, is_saving = self.start(run), "at its end", False
        if draw:
            moment = self.wait_for_moment(process, run, usual, draw)
            is_saving = any(run.glob("**/*.part"))
            kill(process)
        said, _ = process.communicate()
        is_killed, is_finished = process.returncode == -signal.SIGKILL, state_of(run) == "finished"
        tally.killed += is_killed
        tally.in_save += is_killed and is_saving
        if before and (is_finished or num_steps(run) > done):
            tally.resumed += 1
            tally.faults += [] if went_on(said) == before else [f"went on after {went_on(said)} and not {before}"]
        if not is_killed and process.returncode != 0:
            tally.faults.append(f"exit {process.returncode}: {said}")
        elif is_finished:
            tally.finished += 1
            is_equal = (run / ADAPTER).read_bytes() == usual.adapter
            tally.faults += [] if is_equal else [f"the adapter of {run.name} is another one"]
        became = "killed" if is_killed else f"exit {process.returncode}"
        note = f"{', in a save' * is_saving}{', finished' * is_finished}"
        print(f"{tally.killed:3}  {became} {moment}{note}; it had gone on after step {went_on(said)}", flush=True)


def state_of(run: Path) -> str:
    """The state in run.json, empty where the kill came before it."""
    path = run / "run.json"
    return str(json.loads(path.read_text())["state"]) if path.exists() else ""


def went_on(said: str) -> int:
    """The step after which an attempt went on, by its own words; 0 where it began, or had not come so far."""
    found = re.search(r"^resumed after step (\d+)", said, re.MULTILINE)
    return int(found[1]) if found else 0


def main(args: list[str]) -> int:
    """Run until so many kills have happened and the run they hit is finished."""
    own, _ = begin(args, KILLS="50", STEPS="60")
    kills, draw, tally = int(own["KILLS"]), random.Random(int(own["SEED"])), Tally()
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(tiny_model(name), Path(name), int(own["STEPS"]))
        usual = trial.uninterrupted()
        print(f"uninterrupted: {usual.first_s:.1f} s to the first step, {usual.step_s:.3f} s a step", flush=True)
        run = trial.folder / "run-0"
        while (tally.killed < kills or run.exists()) and not tally.faults:
            trial.attempt(run, usual, draw if tally.killed < kills else None, tally)
            run = trial.folder / f"run-{tally.finished}"
    faults = tally.faults or ([] if tally.resumed else ["no attempt went on from a checkpoint"])
    return finish(
        faults,
        f"{tally.killed} kills, {tally.in_save} of them in a save, {tally.resumed} attempts went on from a checkpoint, "
        f"{tally.finished} finished runs",
    )


if __name__ == "__main__":
    run_program(main)
