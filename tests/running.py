"""Run commands as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from launcher.variables import ROOT
from tests.support.zygote import HeavyPopen, WarmPopen

# A training of a tiny model in two steps. A test names what else it needs; of two values the later one counts.
SMALL = ("data.limit=16", "batch.size=8", "optim.lr=1e-2", "model.dtype=fp32", "eval.examples=1", "eval.answers=0")


def start_python(
    *args: str, cwd: Path = ROOT, env: dict[str, str] | None = None, cold: bool | None = None, light: bool = False,
    **streams: Any,
) -> subprocess.Popen[str]:  # fmt: skip
    """`python ARGS` in the background, from the repository unless told otherwise, with nothing to read on stdin.

    A zygote forks it, the one without torch if it is `light`. `cold`: it is started by its command, as a user starts it; so is
    `python -c`, which asks what an import brings.
    """
    is_cold = args[0] == "-c" if cold is None else cold
    start = subprocess.Popen if is_cold else WarmPopen if light else HeavyPopen
    return start(
        [sys.executable, *args], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        text=True, stdin=subprocess.DEVNULL, **streams,
    )  # fmt: skip


def run_python(
    *args: str, cwd: Path = ROOT, env: dict[str, str] | None = None, cold: bool | None = None, light: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python ARGS` to its end.

    How long it may take is for the test to say that runs it: a busy machine takes its time.
    """
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_python(*args, cwd=cwd, env=env, cold=cold, light=light, **streams) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(list(args), process.returncode, out, err)


def train(
    model: Path, run: Path | str, *options: str, program: tuple[str, ...] = ("-m", "launcher", "train"), **rest: Any
) -> subprocess.CompletedProcess[str]:
    """A small training to its end, whatever that is."""
    return run_python(*program, f"MODEL={model}", f"RUN={run}", *SMALL, *options, **rest)


# What a check, a plan or a client must not import: seconds, and nothing that it needs.
HEAVY = {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets", "matplotlib"}
IN_TURN = """
import contextlib, io, json, sys
from launcher.__main__ import main
from launcher.errors import run_main

heavy, lines = json.loads(sys.argv[1])
for words in lines:
    out, err, sys.argv[1:] = io.StringIO(), io.StringIO(), words
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_main(main)
    except SystemExit as end:
        print(json.dumps([end.code, out.getvalue(), err.getvalue(), [name for name in heavy if name in sys.modules]]))
"""


class Told(NamedTuple):
    """What `python -m launcher WORDS` said, and what of HEAVY was loaded by then."""

    code: int
    out: str
    err: str
    loaded: list[str]


def launch_in_turn(lines: list[list[str]], env: dict[str, str] | None = None) -> list[Told]:
    """`python -m launcher WORDS` for each of `lines`, one after the other in one interpreter that starts with nothing.

    They only ask and are refused: one that would train takes the place of those after it.
    """
    done = run_python("-c", IN_TURN, json.dumps([sorted(HEAVY), lines]), env=env)
    told = [Told(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(told) == len(lines), (done.stdout, done.stderr)
    return told
