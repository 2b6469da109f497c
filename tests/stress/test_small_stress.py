"""Each stress program with a few of what it has many of: it passes, and it has done its work."""

import re
from pathlib import Path

import pytest

from tests.running import run_python
from tests.stress.__main__ import PROGRAMS

# The variables of a small version, and its verdict; every number that is caught in it must be more than 0.
SMALL = {
    "client_kills": (["KILLS=12"], r"12 kills \((\d+) in the middle of a line\), (\d+) events finished; 240 files cut off .*"),
    "crowd": (
        ["CLIENTS=24", "REQUESTS=96", "PROCESSES=4", "serve.queue=8"],
        r"(\d+) answers right, (\d+) closed by us in the middle, (\d+) open in the 1 of 4 processes that were killed, (\d+) refusals",
    ),
    "hostile_files": (["FILES=200", "MB=36"], r"(\d+) refusals, (\d+) readings, 5 files of 36 MB"),
    "adapter_swaps": (
        ["ADAPTERS=4", "REQUESTS=16", "TOKENS=8"],
        r"5 adapters, (\d+) swaps, (\d+) keys answered; .*'right': (\d+).*",
    ),
    "slow_reader": (
        ["STOP_S=1", "DELAY=0.003"],
        r"3 readers stopped for 1 s, (\d+) answers to others meanwhile, .* MiB more held at most",
    ),
    "fuzz": (["MESSAGES=1000", "FLAT=no"], r"1000 messages of 21 kinds; (\d+) good answers, 0 of them different"),
    "train_signals": (["SIGNALS=2", "LATEST_S=1"], r"2 signals, (\d+) of them after a step; step (\d+)"),
    "train_kills": (
        ["KILLS=2", "STEPS=16"],
        r"2 kills, \d+ of them in a save, (\d+) attempts went on from a checkpoint, (\d+) finished runs",
    ),
    "train_invariance": (
        ["SEEDS=1", "NGPU=1", "ACCUMULATION=1,2", "PACKING=on,off", "STEPS=8"],
        r"4 launches, losses differ by .* at most",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_small_version_passes_and_has_done_its_work(name):
    words, verdict = SMALL[name]
    done = run_python("-m", f"tests.stress.{name}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("seed 0: ")
    found = re.fullmatch(f"passed: {verdict}", lines[-1])
    assert found, lines[-1]
    assert all(int(number) > 0 for number in found.groups()), lines[-1]


def test_every_program_is_run():
    files = {path.stem for path in Path(__file__).parent.glob("*.py") if "\n    run_program(main)" in path.read_text()}
    assert files == set(PROGRAMS) == set(SMALL)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["ONLY=client_kills", "KILLS=2", "SEED=7"], 0, r"client_kills: seed 7, \d+ s, passed: 2 kills .*"),
        (["ONLY=client_kills", "KILS=2"], 1, r"client_kills: seed unknown, \d+ s, FAILED: exit 2"),
    ],
)
def test_the_runner_tells_the_verdict_of_a_program(words, code, says):
    done = run_python("-m", "tests.stress", *words)
    assert done.returncode == code, done.stderr
    assert re.fullmatch(says, done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ONLY=client_kils"], "error: ONLY=client_kils: no such program; did you mean client_kills?"),
        (["KILLS=2"], "error: KILLS: not every program has it; name one with ONLY="),
    ],
)
def test_the_runner_refuses_what_it_does_not_know(words, says):
    done = run_python("-m", "tests.stress", *words)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (2, "", says)
