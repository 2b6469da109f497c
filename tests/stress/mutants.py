"""Plant one fault after the other in a copy of the checkout, and see whether its tests notice.

    python -m tests.stress.mutants [ONLY=words of its name] [ROOT=another checkout]

A fault is a line of `launcher/` or `serve/` that is a little wrong (`faults.py`). Its tests must pass without it and fail with it.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from launcher.errors import UserError, run_main
from launcher.variables import ROOT
from tests.stress.faults import FAULTS, Fault

SECONDS = 1800


def copied(root: Path, to: Path) -> Path:
    """A copy of the files that git knows of, with the same environment."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_file():
            shutil.copy2(root / name, to / name)
    (to / ".venv").symlink_to((root / ".venv").resolve())
    return to


def run_tests(root: Path, fault: Fault) -> tuple[int, str]:
    """(pytest's exit code, its output) for the tests of a fault."""
    files = [f"tests/{name}.py" for name in fault.tests.split() if (root / "tests" / f"{name}.py").exists()]
    if not files:
        return 5, ""
    # A file that changes twice in a second must not meet what was compiled of it before.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root)}
    command = [".venv/bin/python", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--timeout={SECONDS}", *files]
    done = subprocess.run(
        [*command, "-k", fault.names], cwd=root, env=environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def judge(root: Path, fault: Fault, is_sound: Callable[[Fault], bool]) -> str:
    """`caught by …`, or why it was not."""
    file = root / fault.file
    before = file.read_text(encoding="utf-8")
    if before.count(fault.old) != 1:
        return f"cannot be planted: its text stands {before.count(fault.old)} times in {fault.file}"
    if not is_sound(fault):
        return "its tests do not pass without it, or are not there"
    file.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
    try:
        code, said = run_tests(root, fault)
    finally:
        file.write_text(before, encoding="utf-8")
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return f"caught by {found[1]}" if code == 1 and found else f"missed (pytest ended with {code})"


def main(args: list[str]) -> int:
    """Plant them all, or those whose name has the words of ONLY; 1 if one is not caught."""
    given = dict(arg.partition("=")[::2] for arg in args)
    only, root = given.pop("ONLY", ""), Path(given.pop("ROOT", ROOT)).resolve()
    if given:
        raise UserError(f"{next(iter(given))}: unknown; try ONLY= or ROOT=")
    chosen = [fault for fault in FAULTS if only in fault.name]
    if not chosen:
        raise UserError(f"ONLY={only}: no fault has these words in its name")
    sound: dict[tuple[str, str], bool] = {}

    def is_sound(fault: Fault) -> bool:
        if (fault.tests, fault.names) not in sound:
            sound[fault.tests, fault.names] = run_tests(copy, fault)[0] == 0
        return sound[fault.tests, fault.names]

    num_caught = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = copied(root, Path(folder))
        for fault in chosen:
            begun = time.monotonic()
            verdict = judge(copy, fault, is_sound)
            num_caught += verdict.startswith("caught")
            print(f"{fault.name}: {verdict} ({time.monotonic() - begun:.0f} s)", flush=True)
    is_whole = num_caught == len(chosen)
    print(f"{'passed' if is_whole else 'FAILED'}: {num_caught} of {len(chosen)} faults caught")
    return int(not is_whole)


if __name__ == "__main__":
    run_main(main)
