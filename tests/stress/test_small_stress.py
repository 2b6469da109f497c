"""The hard trials of bench/, each with a few of what the whole has many of."""

import os
import subprocess
import sys

import pytest

from tests.serve_fixtures import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["bench.fuzz", "MESSAGES=4000", "FLAT=no"],
        ["bench.crowd", "CLIENTS=40", "REQUESTS=160", "PROCESSES=5", "LIMIT_MS=60000", "serve.queue=16"],
    ],
)
def test_a_small_trial_ends_well(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
