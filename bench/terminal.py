"""The terminal, looked at from the other side of a real pseudo-terminal.

    python -m bench.terminal [RUN=runs/x | HOLD=echo] [CANCELS=50] [DEATHS=20] [SEED=0]

How soon the prompt is there, how soon a key is echoed while an answer streams, how soon Ctrl-C gives the prompt back, and whether a
conversation goes on when its daemon is killed. The echo of a key is the time until the terminal has been sent a row with it.
"""

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.daemon import chosen, table
from serve.figures import percentile
from tests.serve_fixtures import Box, Screen, wait_until

QUESTION = "Write a very long story about the sea, the city and the mountains, in many chapters. " * 4
STARTS, KEYS = 9, 60
LEAVE, INTERRUPT = "\x04", "\x03"


def start(box: Box, words: list[str]) -> Any:
    """A daemon that is ready."""
    process = box.start("daemon", *words, AFINAR_ECHO_DELAY="0.02")
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("ready: "):
        assert line, process.stderr.read() if process.stderr else ""
    return process


def cold_start(box: Box) -> float:
    """Seconds from starting the program to its prompt."""
    begun = time.perf_counter()
    with Screen(box, "chat") as screen:
        screen.expect("\n>", 20)
        return time.perf_counter() - begun


def is_busy(screen: Screen) -> bool:
    """Whether the toolbar says that an answer is under way."""
    return any(word in screen.text for word in ("answering;", "reading ", "in the queue"))


def echo(screen: Screen, key: str) -> float:
    """Seconds until a key that was pressed has been drawn."""
    seen = len(screen.raw)
    begun = time.perf_counter()
    screen.type(key)
    while key.encode() not in screen.raw[seen:]:
        screen.read(1.0)
    return time.perf_counter() - begun


def echoes(screen: Screen) -> list[float]:
    """The echoes of some keys while an answer streams; the keys stand in no answer."""
    found: list[float] = []
    screen.type(f"{QUESTION}\r")
    screen.expect("answering;", 20)
    for number in range(KEYS):
        found.append(echo(screen, chr(0x2460 + number % 20)))
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            screen.read(0.01)
    assert is_busy(screen), screen.text
    # The first one empties the prompt.
    screen.type(INTERRUPT)
    screen.type(INTERRUPT)
    wait_until(lambda: screen.read(0.01) and not is_busy(screen), 20)
    return found


def cancel(screen: Screen, chosen_: random.Random) -> float:
    """Seconds from Ctrl-C, at a random moment of an answer, until the prompt is free."""
    screen.type(f"{chosen_.random()} {QUESTION}\r")
    wait_until(lambda: screen.read(0.01) and is_busy(screen), 20)
    end = time.monotonic() + chosen_.random() * 1.5
    while time.monotonic() < end:
        screen.read(0.005)
    if not is_busy(screen):
        return 0.0
    begun = time.perf_counter()
    screen.type(INTERRUPT)
    while is_busy(screen):
        screen.read(0.005)
    return time.perf_counter() - begun


def death(box: Box, words: list[str], process: Any, screen: Screen, chosen_: random.Random) -> Any:
    """Kill the daemon in the middle of an answer, start another one, and ask again by Enter; the new daemon."""
    screen.type(f"{chosen_.random()} {QUESTION}\r")
    screen.expect("answering;", 30)
    end = time.monotonic() + chosen_.random()
    while time.monotonic() < end:
        screen.read(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    screen.expect("no daemon", 20)
    process = start(box, words)
    screen.expect("Enter asks again.", 30)
    screen.settle()
    screen.type("\r")
    screen.expect("answering;", 30)
    screen.type(INTERRUPT)
    wait_until(lambda: screen.read(0.01) and not is_busy(screen), 20)
    return process


def alternates(box: Box) -> bool:
    """Whether every question in every conversation on the disk was answered, or withdrawn, before the next."""
    for path in (box.folder / ".local/state/afinar/conversations").glob("*.jsonl"):
        kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
        asked = [kind for kind in kinds if kind in ("user", "regenerate", "answer", "withdraw")]
        if any((kind in ("user", "regenerate")) == bool(number % 2) for number, kind in enumerate(asked)):
            return False
    return True


def main(args: list[str]) -> int:
    """Measure and print a table."""
    own, words = chosen(args, CANCELS="50", DEATHS="20", SEED="0")
    words = [f"RUN={Path(word[4:]).absolute()}" if word.startswith("RUN=") else word for word in words]
    random_ = random.Random(int(own["SEED"]))
    with tempfile.TemporaryDirectory(prefix="af-", dir="/tmp") as folder:
        box = Box(Path(folder))
        process = start(box, words)
        starts = [cold_start(box) for _ in range(STARTS)]
        # So hot that no answer comes to its end before it is cancelled.
        with Screen(box, "chat", "--set", "temperature=3") as screen:
            screen.expect("\n>", 20)
            keys = echoes(screen)
            screen.type("/reset\r")
            cancels = [cancel(screen, random_) for _ in range(int(own["CANCELS"]))]
            busy = screen.ask("/status", "slots busy")[-1].split(" slots")[0]
            screen.type("/reset\r")
            screen.settle()
            for number in range(int(own["DEATHS"])):
                process = death(box, words, process, screen, random_)
                print(f"death {number + 1}: the conversation goes on", file=sys.stderr)
            screen.type(LEAVE)
            screen.wait(20)
        rows = [
            ("start to prompt, median", f"{1e3 * statistics.median(starts):.0f} ms", f"slowest {1e3 * max(starts):.0f}"),
            ("key to echo while streaming, p95", f"{1e3 * percentile(keys, 95):.0f} ms", f"p50 {1e3 * percentile(keys, 50):.0f}"),
            (f"Ctrl-C to prompt, {len(cancels)} times, slowest", f"{1e3 * max(cancels):.0f} ms", f"p50 {1e3 * percentile(cancels, 50):.0f}"),
            ("slots busy afterwards", busy, ""),
            ("daemons killed in an answer", own["DEATHS"], "went on each time"),
            ("turns alternate on the disk", "yes" if alternates(box) else "NO", ""),
        ]  # fmt: skip
        print(table(("", "", ""), rows))
        box.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
