"""Several real processes, and what goes wrong with one of them: who failed, why, and what becomes of the run."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher import checkpoint, failures
from launcher.report import read_metrics
from launcher.variables import ROOT
from tests.planted import planted
from tests.running import run_python
from tests.serve_fixtures import wait_until

# Seconds until a run that was ended has left: no speed is measured, and a busy machine takes its time.
PATIENCE = 240
# Rank 1 measures one part of the held-out examples before its first step, then one micro-batch a step.
SIX_STEPS = 7
SMALL = [
    "NGPU=2", "data.limit=64", "batch.size=8", "optim.lr=1e-2", "optim.epochs=100", "model.dtype=fp32",
    "checkpoint.every=4", "eval.every=1000", "eval.examples=2", "eval.answers=0",
]  # fmt: skip


def arguments(model, run, *args):
    return ["-m", "launcher", "train", f"MODEL={model}", f"RUN={run}", *SMALL, *args]


def start(model, run, *args):
    """The same in the background."""
    return subprocess.Popen(
        [sys.executable, *arguments(model, run, *args)], cwd=ROOT, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def wait_for_steps(process, run, count):
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def workers(process):
    """The training processes by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        # What a worker starts comes behind it, has its rank, and may end while we look.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
            found.setdefault(int(child.environ()["RANK"]), child)
    return found


def is_alive(worker):
    with contextlib.suppress(psutil.NoSuchProcess):
        return worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    return False


def suspend(worker):
    worker.suspend()
    wait_until(lambda: worker.status() == psutil.STATUS_STOPPED)


def is_pending(worker, number):
    """Whether that signal waits until the process goes on."""
    pending = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{worker.pid}/status").read_text())[1]
    return bool(int(pending, 16) & 1 << number - 1)


@pytest.mark.slow
def test_an_error_in_one_process_names_it_first(tiny_llama, tmp_path):
    run = tmp_path / "run"
    env = planted(tmp_path / "fault", "raise RuntimeError('the rain in Spain')", rank=1, at=SIX_STEPS)
    done = run_python(*arguments(tiny_llama, run), env=env)
    assert done.returncode == 1
    first = done.stderr.splitlines()[:5]
    assert "rank 1 on " in first[0]
    assert "failed at step 6, a micro-batch: RuntimeError: the rain in Spain" in first[0]
    assert any(str(run / "logs" / "rank-1.log") in line for line in first)
    assert "ChildFailedError" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "the rain in Spain" in (run / "logs" / "rank-1.log").read_text()
    assert checkpoint.newest(run)[0].step == 4


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(tiny_llama, tmp_path):
    run = tmp_path / "run"
    process = start(tiny_llama, run)
    wait_for_steps(process, run, 3)
    workers(process)[1].kill()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "rank 1 on " in err.splitlines()[0]
    assert "SIGKILL" in err.splitlines()[0]
    assert "likely cause" in err


@pytest.mark.slow
def test_the_watchdog_names_the_process_that_stopped_answering(tiny_llama, tmp_path):
    run = tmp_path / "run"
    process = start(tiny_llama, run, "parallel.timeout_s=12")
    wait_for_steps(process, run, 3)
    left = workers(process)
    suspend(left[1])
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "rank 1 on " in err.splitlines()[0]
    assert "stopped answering for 12 s" in err.splitlines()[0]
    assert not any(map(is_alive, left.values()))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(tiny_llama, tmp_path, strategy):
    run = tmp_path / "run"
    process = start(tiny_llama, run, f"STRATEGY={strategy}")
    wait_for_steps(process, run, 5)
    workers(process)[1].send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, err
    assert "run the same command again" in out
    assert json.loads((run / "run.json").read_text())["state"] == "stopped"
    assert checkpoint.newest(run)[0].step == len(read_metrics(run))


@pytest.mark.slow
def test_a_signal_to_the_front_door_reaches_all_and_a_second_one_ends_at_once(tiny_llama, tmp_path):
    run = tmp_path / "run"
    process = start(tiny_llama, run)
    wait_for_steps(process, run, 2)
    left = workers(process)
    suspend(left[1])  # so that the first signal cannot be agreed on
    process.send_signal(signal.SIGINT)
    wait_until(lambda: is_pending(left[1], signal.SIGINT))
    process.send_signal(signal.SIGINT)
    # Going on before, it would agree with the other one on the first signal after all.
    wait_until(lambda: not is_alive(left[0]))
    left[1].resume()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGINT
    assert checkpoint.newest(run)[0] is None or checkpoint.newest(run)[0].step % 4 == 0


@pytest.mark.slow
def test_when_the_front_door_is_killed_its_processes_save_and_leave(tiny_llama, tmp_path):
    run = tmp_path / "run"
    process = start(tiny_llama, run)
    wait_for_steps(process, run, 2)
    left = list(workers(process).values())
    process.kill()
    wait_until(lambda: not any(map(is_alive, left)), PATIENCE)
    assert json.loads((run / "run.json").read_text())["state"] == "stopped"


@pytest.mark.slow
def test_out_of_memory_goes_on_with_a_smaller_micro_batch(tiny_llama, tmp_path):
    # Real exhaustion: the address space of rank 1 ends where it is, and the next batch asks for 4 GB.
    run, whole = tmp_path / "run", tmp_path / "whole"
    limit = (
        "import resource, torch; size = int(open('/proc/self/statm').read().split()[0]) * 4096; "
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28)); torch.empty(2**32, dtype=torch.uint8)"
    )
    env = planted(tmp_path / "fault", limit, rank=1, at=SIX_STEPS)
    done = run_python(*arguments(tiny_llama, run, "optim.max_steps=10"), env=env)
    assert done.returncode == 0, done.stderr
    assert "rank 1 ran out of memory" in done.stdout
    assert "2 x 2 x 2 instead of 4 x 1 x 2" in done.stdout
    assert "resumed after step 4" in done.stdout
    assert json.loads((run / "run.json").read_text())["training"]["micro_batch"] == 2
    assert run_python(*arguments(tiny_llama, whole, "optim.max_steps=10")).returncode == 0
    pairs = zip(read_metrics(run), read_metrics(whole), strict=True)
    assert all(abs(a["loss"] - b["loss"]) < 1e-3 for a, b in pairs)


@pytest.mark.slow
def test_what_earlier_runs_left_ends_no_later_one(tiny_llama, tmp_path):
    # The third process of a run of three that was told to stop, and the second machine of a run of two.
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    failures.record(run / "logs", 2, "stopped", "step 3, a micro-batch", "told to stop")
    failures.record(run / "logs", 3, "user", "its start", "another training writes here now; try another RUN=")
    done = run_python(*arguments(tiny_llama, run, "optim.max_steps=6"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_same_command_twice_leaves_the_first_alone(tiny_llama, tmp_path):
    run = tmp_path / "run"
    first = start(tiny_llama, run, "optim.epochs=5000")
    wait_for_steps(first, run, 2)
    second = run_python(*arguments(tiny_llama, run, "optim.epochs=5000"))
    assert second.returncode == 2
    assert second.stderr == f"error: {run}: another training writes here now; try another RUN=\n"
    # What the first one would take for a failure of its own.
    assert not list((run / "logs").glob("*.failure.json"))
    wait_for_steps(first, run, len(read_metrics(run)) + 3)
    first.send_signal(signal.SIGTERM)
    assert (first.wait(PATIENCE), json.loads((run / "run.json").read_text())["state"]) == (75, "stopped")
