"""What the tests of pipes share."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.serve_fixtures import PATIENCE, Box

FORMS = pytest.mark.parametrize("flags", [(), ("--json",)], ids=["plain", "json"])
PYTHON = f"{sys.executable} -m serve"


def pipe(box: Box, data: bytes, *words: str, **extra: str) -> subprocess.CompletedProcess[bytes]:
    """`python -m serve chat WORDS | cat`, in bytes; the exit code is that of the first."""
    return subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | cat', "bash", sys.executable, "-m", "serve", "chat", *words],
        cwd=box.work,
        env=box.environment(**extra),
        input=data,
        capture_output=True,
        timeout=PATIENCE,
    )


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def in_shell(box: Box, words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"{PYTHON} {words}"]
    return subprocess.run(
        command, cwd=box.work, env=box.environment(), input="hi", capture_output=True, text=True, timeout=PATIENCE
    )


def check_ending(last: str, error: str, flags: tuple[str, ...], code: int) -> dict[str, Any]:
    assert error.startswith("error: ") and error.count("\n") == 1
    if not flags:
        return {"message": error[len("error: ") : -1]}
    found = json.loads(last)
    assert (found["type"], found["exit"], error) == ("error", code, f"error: {found['message']}\n")
    return dict(found)
