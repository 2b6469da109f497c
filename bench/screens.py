"""Record what a user sees: `python -m bench.screens RUN=runs/x` writes docs/screens.md, from a real model in a real pseudo-terminal."""

import os
import signal
import sys
import tempfile
from pathlib import Path

from bench.daemon import chosen
from bench.terminal import is_busy, start
from tests.serve_fixtures import Box, Screen, wait_until

SIZE = (96, 30)
ORDER = "Hi, can I get a large green tea to take away?"
STORY = "Write a long story about the sea."
HEAD = """# Screens

Recorded by `python -m bench.screens RUN={run}` ({model}), each a terminal of {columns} columns. The last line is the toolbar.
"""


def idle(screen: Screen) -> None:
    """Wait until the answer is over."""
    screen.settle(0.5, 60)
    wait_until(lambda: screen.read(0.1) and not is_busy(screen), 120)
    screen.settle(0.3)


def shot(title: str, screen: Screen, first: str) -> str:
    """The rows from the last one that begins so."""
    rows = screen.rows
    begin = max(i for i, row in enumerate(rows) if row.startswith(first))
    body = "\n".join(f"    {row}".rstrip() for row in rows[begin:])
    return f"## {title}\n\n{body}\n"


def record(box: Box, words: list[str], name: str) -> list[str]:
    """All the screens, in the order of the page."""
    process, shots = start(box, words), []
    with Screen(box, "chat", size=SIZE) as screen:
        screen.expect("\n>", 20)
        screen.type(f"{ORDER}\r")
        idle(screen)
        shots.append(shot("A question", screen, screen.rows[0][:20]))
        screen.type(f"/compare {name} base\r")
        idle(screen)
        shots.append(shot("Did it get better?", screen, "> /compare"))
        screen.type(f"/adapter base\r/set max_tokens=200\r{STORY}\r")
        screen.expect("answering;", 30)
        screen.read(1.0)
        for _ in range(40):
            screen.read(0.05)
        shots.append(shot("During an answer", screen, f"> {STORY}"))
        screen.type("\x03")
        idle(screen)
        shots.append(shot("Ctrl-C", screen, f"> {STORY}"))
        screen.type("/regenerate\r")
        screen.expect("answering;", 30)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        screen.expect("no daemon", 20)
        start(box, words)
        screen.expect("Enter asks again.", 60)
        screen.settle()
        shots.append(shot("The daemon was killed, and started again", screen, "error: the daemon"))
        screen.type("\x03/undo\r/stats\r/save first-talk\r/resume\r")
        idle(screen)
        shots.append(shot("Commands", screen, "> /undo"))
        screen.type("/export talk.md\r/hepl\r/quit\r")
        screen.wait(20)
    with Screen(box, "chat", size=SIZE, AFINAR_LANG="es") as screen:
        screen.expect("\n>", 20)
        screen.type("/resume first\r/help\r")
        idle(screen)
        shots.append(shot("In Spanish", screen, "> /resume"))
    return shots


def main(args: list[str]) -> int:
    """Record, and write the page."""
    own, _ = chosen(args, RUN="runs/smollm2-135m-lora")
    run = Path(own["RUN"]).absolute()
    with tempfile.TemporaryDirectory(prefix="af-", dir="/tmp") as folder:
        box = Box(Path(folder))
        (box.work / "runs").mkdir()
        (box.work / "runs" / run.name).symlink_to(run)
        try:
            shots = record(box, [f"RUN=runs/{run.name}", "HOLD=adapters"], run.name)
        finally:
            box.close()
    head = HEAD.format(run=own["RUN"], model="SmolLM2-135M, one lora run, HOLD=adapters", columns=SIZE[0])
    Path("docs/screens.md").write_text("\n".join([head, *shots]), encoding="utf-8")
    print("written: docs/screens.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
