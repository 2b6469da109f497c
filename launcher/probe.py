"""A short probe: the first steps of the very training that was planned, in a folder that is thrown away."""

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.effort import duration
from launcher.errors import EXIT_STOPPED, UserError
from launcher.hardware import GIB
from launcher.plan import Plan
from launcher.report import METRICS, read_metrics

# The first step warms up.
NUM_STEPS = 5
QUIET = ("eval.answers=0", "eval.examples=1")


def run(args: list[str], decided: Plan, steps: int) -> str:
    """Train a few steps and tell how long all `steps` would take, and the memory it took."""
    kept = [arg for arg in args if not arg.startswith(("PROBE=", "RUN=", "run.dir=", "checkpoint.every="))]
    with tempfile.TemporaryDirectory(prefix="afinar-probe-") as folder:
        run_dir = Path(folder, "run")
        command = [sys.executable, "-m", "launcher", "train", *kept, f"RUN={run_dir}", *QUIET]
        print(f"probe      {NUM_STEPS} steps …", flush=True)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        _wait_for_steps(process, run_dir / METRICS, min(NUM_STEPS, steps))
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate()
        if process.returncode not in (0, EXIT_STOPPED):
            raise UserError(f"the probe failed: {said.decode(errors='replace').strip().splitlines()[-1]}")
        measured = read_metrics(run_dir)
    seconds = statistics.median(record["step_s"] for record in measured[1:] or measured)
    peak = max(record["peak_bytes"] for record in measured) / GIB
    tokens = statistics.median(record["tokens"] for record in measured)
    planned = ""
    if decided.memory:
        planned = f" ({decided.memory.total / GIB:.2f} GiB planned for examples of up to {decided.longest} tokens)"
    return (
        f"time       about {duration(seconds * steps)}: {steps} steps of {seconds:.2f} s, {tokens:.0f} tokens each, "
        f"evaluations not counted; peak {peak:.2f} GiB{planned}"
    )


def _wait_for_steps(process: subprocess.Popen[bytes], metrics: Path, count: int) -> None:
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= count):
        time.sleep(0.1)
