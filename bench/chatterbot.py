"""Real data to train on: the dialogues of the PyPI package chatterbot-corpus (BSD licence), written as conversations.

    python -m bench.chatterbot OUT.jsonl [LANGUAGE …]      english and spanish unless others are given

The package is downloaded, not installed. What people wrote has faults: what cannot be learned is left out, counted and told.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import UserError, nearest, run_main
from launcher.rundir import write_atomically

PACKAGE = "chatterbot-corpus==1.3.3"
FOLDER = "chatterbot_corpus/data"
LANGUAGES = ("english", "spanish")
ROLES = ("user", "assistant")
UNANSWERED = "kept without an unanswered last turn"


def main(args: list[str]) -> int:
    """Write the conversations, and say how many, what was left out and what to do next."""
    out = check_out(args)
    chosen = list(dict.fromkeys(args[1:] or LANGUAGES))
    lines: list[str] = []
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as tmp, zipfile.ZipFile(download(Path(tmp))) as wheel:
        for language, names in files(wheel, chosen).items():
            before, faults = len(lines), Counter[str]()
            for dialogue in dialogues(wheel, names):
                line = convert(dialogue, seen, faults)
                lines += [line] if line else []
            told = "".join(f"; {count} {fault}" for fault, count in sorted(faults.items()) if count)
            print(f"{language}: {len(lines) - before} conversations{told}")
    write_atomically(out, "".join(line + "\n" for line in lines).encode())
    print(f"{len(lines)} conversations -> {out}. Next: make train DATA={shlex.quote(str(out))}")
    return 0


def check_out(args: list[str]) -> Path:
    """Where to write; raises `UserError`, before anything is downloaded, where that cannot be."""
    if not args:
        raise UserError("no file to write to; try: python -m bench.chatterbot chatterbot.jsonl")
    out = Path(args[0])
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: conversations are written as .jsonl; try {out.with_suffix('.jsonl')}")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; try {out.name}")
    if out.exists():
        raise UserError(f"{out}: exists; try another name, or remove it")
    return out


def download(folder: Path) -> Path:
    """Download the package's wheel without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    answer = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    wheels = list(folder.glob("*.whl"))
    if answer.returncode != 0 or not wheels:
        why = next((line for line in answer.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
        raise UserError(f"{PACKAGE} cannot be fetched ({why}); check the network and try again")
    return wheels[0]


def files(wheel: zipfile.ZipFile, languages: list[str]) -> dict[str, list[str]]:
    """The dialogue files of each of these languages; raises `UserError` for one that the package does not have."""
    paths = [Path(name) for name in sorted(wheel.namelist()) if name.startswith(FOLDER) and name.endswith(".yml")]
    there = list(dict.fromkeys(path.parent.name for path in paths))
    if faults := [f"{name}: no such language; {nearest(name, there)}" for name in languages if name not in there]:
        raise UserError(*faults)
    return {name: [str(path) for path in paths if path.parent.name == name] for name in languages}


def dialogues(wheel: zipfile.ZipFile, names: list[str]) -> list[Any]:
    """What these files list as conversations, whatever it is."""
    return [dialogue for name in names for dialogue in yaml.safe_load(wheel.read(name))["conversations"]]


def convert(dialogue: Any, seen: set[str], faults: Counter[str]) -> str | None:
    """The line of one dialogue; None, and a reason counted in `faults`, where it is no use or in `seen`."""
    if fault := why_useless(dialogue):
        faults[fault] += 1
        return None
    answered = dialogue[: len(dialogue) // 2 * 2]
    messages = [{"role": ROLES[n % 2], "content": turn.strip()} for n, turn in enumerate(answered)]
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    # Some are in the package a hundred times: what is trained on must not be measured with.
    if line in seen:
        faults["left out: the same as another"] += 1
        return None
    seen.add(line)
    faults[UNANSWERED] += len(dialogue) % 2
    return line


def why_useless(dialogue: Any) -> str | None:
    """Why nothing can be learned from this, None if something can."""
    if not isinstance(dialogue, list):
        return "left out: no list of turns"
    if not all(isinstance(turn, str) and turn.strip() for turn in dialogue):
        return "left out: a turn that is empty or no text"
    return "left out: fewer than two turns" if len(dialogue) < 2 else None


if __name__ == "__main__":
    run_main(main)
