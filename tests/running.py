"""Run commands as a user would."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher.variables import ROOT
from tests.support.zygote import HeavyPopen


def start_python(
    *args: str, cwd: Path = ROOT, env: dict[str, str] | None = None, cold: bool | None = None, **streams: Any
) -> subprocess.Popen[str]:
    """`python ARGS` in the background, from the repository unless told otherwise, with nothing to read on stdin.

    A zygote forks it. `cold`: it is started by its command, as a user starts it; so is `python -c`, which asks what an import brings.
    """
    is_cold = args[0] == "-c" if cold is None else cold
    start = subprocess.Popen if is_cold else HeavyPopen
    return start(
        [sys.executable, *args], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        text=True, stdin=subprocess.DEVNULL, **streams,
    )  # fmt: skip


def run_python(
    *args: str, cwd: Path = ROOT, env: dict[str, str] | None = None, cold: bool | None = None
) -> subprocess.CompletedProcess[str]:
    """`python ARGS` to its end.

    How long it may take is for the test to say that runs it: a busy machine takes its time.
    """
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_python(*args, cwd=cwd, env=env, cold=cold, **streams) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(list(args), process.returncode, out, err)
