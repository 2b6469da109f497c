"""Failures in words, signals, and a process that is alone with too little memory."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest

from launcher import failures
from launcher.beat import LOADING, Beat, FreshFiles, Watchdog, read_sign
from launcher.failures import Failure, block, explain
from launcher.report import read_metrics
from launcher.variables import ROOT
from tests.planted import planted
from tests.running import run_python
from tests.serve_fixtures import wait_until


def failure(message, rank=1, kind="error", at=0.0):
    return Failure(rank, "node-a", kind, "step 12", message, at)


NO_SHARED_MEMORY = (
    "Last error: Error while creating shared memory segment /dev/shm/nccl-5m3gUY (size 9637888), "
    "error: No space left on device (28)"
)


@pytest.mark.parametrize(
    ("message", "cause", "remedy"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "no memory left", "batch.micro"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "no memory left", "PEFT=qlora"),
        ("DistNetworkError: EADDRINUSE: address already in use", "holds the port", "MASTER_PORT"),
        ("DistBackendError: NCCL error: unhandled cuda error", "GPUs cannot talk", "NCCL_DEBUG=INFO"),
        ("OSError: 401 Client Error: Unauthorized", "wants a token", "HUGGINGFACE_TOKEN"),
        ("OSError: [Errno 28] No space left on device", "disk is full", "freeing some space"),
        (f"DistBackendError: NCCL error: {NO_SHARED_MEMORY}", "has too little", "--ipc=host"),
        ("RuntimeError: Connection closed by peer", "did not answer", "MASTER_ADDR"),
        ("ended by SIGKILL", "ran out of memory", "dmesg"),
        ("ended by SIGSEGV", "native code crashed", "requirements.lock"),
    ],
)
def test_what_is_known_is_explained(tmp_path, message, cause, remedy):
    lines = block(failure(message), tmp_path)
    assert lines[0] == f"error: rank 1 on node-a failed at step 12: {message}"
    assert cause in lines[1]
    assert remedy in lines[-1]
    assert lines[-1].startswith("  try: ")
    assert str(tmp_path / "rank-1.log") in lines[2]


def test_shared_memory_is_no_disk():
    assert not failures.is_disk_full(RuntimeError(NO_SHARED_MEMORY))
    assert failures.is_disk_full(RuntimeError(NO_SHARED_MEMORY.replace("/dev/shm/nccl-5m3gUY", "/data/x")))


def test_what_is_not_known_still_says_where_to_look(tmp_path):
    assert explain("KeyError: 'x'") is None
    lines = block(failure("KeyError: 'x'"), tmp_path)
    assert "rank-1.log" in lines[1]
    assert "try: " in lines[2]


def test_the_users_own_mistakes_are_told_as_ever(tmp_path):
    lines = block(failure("a: bad; try b\nc: worse; try d", kind="user"), tmp_path)
    assert lines == ["error: a: bad; try b", "error: c: worse; try d"]


@pytest.mark.parametrize(
    "message",
    [
        "RuntimeError: [/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9",
        "RuntimeError: [/gloo/transport/tcp/pair.cc:144] no connection. This is typically caused by a remote worker hanging "
        "or bugs in the application. Check the logs of the remote worker before reporting an error. GLHF!",
        "RuntimeError: Application timeout caused pair closure",
        "DistBackendError: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4) ran for 600000 milliseconds",
    ],
)
def test_what_only_tells_of_another_process_is_an_echo(message):
    assert failure(message).is_echo


def test_the_first_failure_is_no_echo_and_of_this_attempt(tmp_path):
    told = [
        failure("RuntimeError: Connection closed by peer [127.0.0.1]", rank=0, at=1.0),
        failure("ValueError: the rain", rank=1, at=2.0),
        failure("ValueError: later", rank=2, at=3.0),
        Failure(3, "node-a", "error", "step 1", "ValueError: of the attempt before", 0.5, attempt=1),
    ]
    for one in told:
        (tmp_path / f"rank-{one.rank}.failure.json").write_text(json.dumps(one.__dict__))
    (tmp_path / "rank-9.failure.json").write_text("{torn")
    assert [f.rank for f in failures.read(tmp_path, attempt=0)] == [1, 2, 0]
    assert [f.rank for f in failures.read(tmp_path, attempt=1)] == [3]


def test_files_of_earlier_runs_do_not_count_until_they_are_written_again(tmp_path):
    failures.record(tmp_path, 1, "stopped", "step 3", "told to stop")
    (tmp_path / "rank-2.beat").write_text("90 4 0 a micro-batch\n")
    for file in tmp_path.iterdir():
        os.utime(file, (1e9, 1e9))
    fresh = FreshFiles(tmp_path)
    dog = Watchdog(fresh, timeout_s=20)
    (tmp_path / "rank-0.beat").write_text("9 5 0 a micro-batch\n")
    assert failures.read(fresh, attempt=0) == []
    assert dog.look(0) is None
    assert dog.look(30) == (0, "a micro-batch; its process does not answer at all")
    failures.record(tmp_path, 1, "user", "its start", "no; try yes")
    (tmp_path / "rank-2.beat").write_text("91 4 0 a micro-batch\n")
    assert [f.kind for f in failures.read(fresh, attempt=0)] == ["user"]
    assert dog.look(31) is None
    assert dog.look(60)[0] == 2


def test_a_process_that_loads_is_not_stuck_however_long_it_takes(tmp_path):
    file = tmp_path / "rank-0.beat"
    beat, dog, hours = Beat(file), Watchdog(tmp_path, timeout_s=600), itertools.count(step=3600.0)

    def look_again(before):
        wait_until(lambda: read_sign(file).ticks > before.ticks)
        return dog.look(next(hours))

    for place in LOADING:
        # The words are those of the programs.
        assert any(f'.at("{place}")' in program.read_text() for program in (ROOT / "launcher").glob("*.py"))
        beat.at(place)
        assert [look_again(read_sign(file)) for _ in range(2)] == [None, None]
    beat.at("the evaluation")
    wait_until(lambda: read_sign(file).doing == "the evaluation")
    assert dog.look(next(hours)) is None
    rank, doing = dog.look(next(hours))
    assert (rank, doing.split(";")[0]) == (0, "the evaluation")


PROGRAM = """
import time
from launcher.stopping import Stop
stop = Stop().install()
print("ready", flush=True)
while not stop.is_set: time.sleep(0.01)
stop.is_leaving = {is_leaving}
print("set", flush=True)
time.sleep(1 if stop.is_leaving else 600)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("is_leaving", [False, True])
def test_the_first_signal_asks_and_the_second_ends_who_is_not_leaving(name, is_leaving):
    number = getattr(signal, name)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(is_leaving=is_leaving)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "set\n"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (0 if is_leaving else 128 + number)


SMALL = ["data.limit=64", "batch.size=8", "model.dtype=fp32", "eval.examples=1", "eval.answers=0", "checkpoint.every=3"]
# The address space ends where it is while one batch is made, and that batch asks for 4 GB: real exhaustion.
EXHAUSTED = (
    "import resource, torch; size = int(open('/proc/self/statm').read().split()[0]) * 4096; "
    "resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, resource.RLIM_INFINITY))\n"
    "            try: torch.empty(2**32, dtype=torch.uint8)\n"
    "            finally: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)"
)


def alone(model, run, *args, env=None):
    # A launcher's rank, so that the fault is planted in it.
    return run_python("-m", "launcher", "train", f"MODEL={model}", f"RUN={run}", *SMALL, *args, env=env)


@pytest.mark.slow
def test_a_process_alone_takes_the_same_step_in_smaller_parts(tiny_llama, tmp_path):
    env = planted(tmp_path / "fault", EXHAUSTED, rank=None, at=7)
    done = alone(tiny_llama, tmp_path / "run", env=env)
    assert done.returncode == 0, done.stderr
    assert "going on with 4 x 2 x 1 instead of 8 x 1 x 1" in done.stdout
    assert alone(tiny_llama, tmp_path / "whole").returncode == 0
    cut, whole = ([record["loss"] for record in read_metrics(tmp_path / name)] for name in ("run", "whole"))
    assert cut == pytest.approx(whole, abs=1e-4)


@pytest.mark.slow
def test_an_error_in_a_process_alone_costs_no_step(tiny_llama, tmp_path):
    from launcher import checkpoint

    env = planted(tmp_path / "fault", "raise RuntimeError('the rain')", rank=None, at=7)
    done = alone(tiny_llama, tmp_path / "run", env=env)
    assert done.returncode == 1
    assert "the rain" in done.stderr
    assert checkpoint.newest(tmp_path / "run")[0].step == len(read_metrics(tmp_path / "run")) == 5


@pytest.mark.slow
def test_one_example_that_does_not_fit_is_told_with_what_to_try(tiny_llama, tmp_path):
    env = planted(tmp_path / "fault", EXHAUSTED, rank=None, at=7)
    done = alone(tiny_llama, tmp_path / "run", "batch.micro=1", env=env)
    assert done.returncode == 2
    assert "one example at a time does not fit" in done.stderr
    assert "try model.gradient_checkpointing=true" in done.stderr


@pytest.mark.slow
def test_a_probe_tells_time_and_memory_and_leaves_nothing(tiny_llama, tmp_path):
    done = run_python("-m", "launcher", "plan", f"MODEL={tiny_llama}", "PROBE=yes", "data.limit=200", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("time "))
    assert "about" in line
    assert "25 steps of" in line
    assert "peak" in line
    assert not (ROOT / "runs" / f"{tiny_llama.name}-lora").exists()
