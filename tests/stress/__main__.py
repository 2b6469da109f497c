"""Run the stress programs one after the other, each with its default sizes, and tell a line of each.

    python -m tests.stress [ONLY=name] [SEED=0] [NAME=value …]

With ONLY, one program, whose words are shown as they come and which takes the other variables too.
"""

import re
import subprocess
import sys
import time

from launcher.errors import UserError, nearest, run_main
from launcher.variables import ROOT

# The quick ones first.
PROGRAMS = (
    "client_kills", "crowd", "hostile_files", "adapter_swaps", "slow_reader", "fuzz", "train_signals", "train_kills",
    "train_invariance",
)  # fmt: skip


def run_one(name: str, words: list[str], *, is_shown: bool) -> bool:
    """Run a program, and tell its seed, its verdict and its time; where it failed, all that it said. Whether it passed."""
    begun, said = time.monotonic(), []
    command = [sys.executable, "-m", f"tests.stress.{name}", *words]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        for line in process.stdout:
            said.append(line)
            print(line, end="", flush=True) if is_shown else None
    last = said[-1].strip() if said else ""
    passed = process.returncode == 0 and last.startswith("passed: ")
    if not passed and not is_shown:
        print(*said, sep="", end="")
    seed = re.match(r"seed (\d+)", said[0] if said else "")
    verdict = last if passed or last.startswith("FAILED: ") else f"FAILED: exit {process.returncode}"
    print(f"{name}: seed {seed[1] if seed else 'unknown'}, {time.monotonic() - begun:.0f} s, {verdict}", flush=True)
    return passed


def main(args: list[str]) -> int:
    """Run all programs, or one; 1 if any of them failed."""
    given = dict(arg.partition("=")[::2] for arg in args)
    only = given.pop("ONLY", "")
    if only and only not in PROGRAMS:
        raise UserError(f"ONLY={only}: no such program; {nearest(only, PROGRAMS)}")
    if others := [name for name in given if name != "SEED" and not only]:
        raise UserError(f"{others[0]}: not every program has it; name one with ONLY=")
    words = [f"{name}={value}" for name, value in given.items()]
    results = [run_one(name, words, is_shown=bool(only)) for name in PROGRAMS if only in ("", name)]
    return int(not all(results))


if __name__ == "__main__":
    run_main(main)
