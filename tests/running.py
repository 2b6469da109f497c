"""Run commands as a user would."""

import os
import subprocess
import sys
from pathlib import Path

from launcher.variables import ROOT


def run_python(*args: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python ARGS`, from the repository unless told otherwise, with nothing to read on stdin.

    How long it may take is for the test to say that runs it: a busy machine takes its time.
    """
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
