"""Stop a reader in the middle of its answer: it must lose no word, and nobody else must notice.

    python -m bench.slow_reader [STOP_S=30] [RUN=… | HOLD=echo] [serve.name=value …]

Three readers, one after the other. The first is `chat | (sleep 30; cat)`: its output blocks, its process lives. The others are stopped
outright (SIGSTOP), so that they cannot even say that they live: one whose answer is done before the daemon takes it for dead, and
one whose answer is longer and is therefore cut off. Meanwhile four good clients are answered; what lies between their words
is compared with the time before. Exit code 1 unless the first two get their whole text, the daemon holds less than 4 MiB more for it, and
the others' p50 stays within 10 %.
"""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from bench.serving import Served, answer, chosen, served
from bench.streams import Seen, questions, solo, streaming
from serve.client import connect
from serve.engines import rss_bytes
from serve.figures import percentile
from serve.submission import Submission

OTHERS = 4
ECHO_DELAY = 0.02
CALM_S = 15.0
HELD = 4 * 2**20
SHARE = 0.10
# One page is the least that a pipe can be; filled but for so much, an answer does not fit.
PIPE_BYTES, ROOM = 4096, 64
SHORT = "Tell me something short about lighthouses: " + "y más ñ 🦊 " * 5
LONG = "Tell me everything about lighthouses, from the first fire on a hill to the last keeper: " + "y más ñ 🦊 " * 40


@dataclass
class Trial:
    """What one stopped reader got and what the others noticed."""

    text: str
    exit_code: int
    said: str
    seen: Seen
    held: int


def ask_and_stop(served: Served, question: str, seconds: float, *, by_signal: bool) -> tuple[str, int, str, int]:
    """Ask through a pipe whose end is not read for so long: (text, exit code, stderr, most bytes more in the daemon)."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    filled = 0 if by_signal else os.write(writing, bytes(PIPE_BYTES - ROOM))
    before = most = rss_bytes(served.record.pid)
    client = subprocess.Popen(
        [sys.executable, "-m", "serve", "chat"], env=served.environment, stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writing)
    assert client.stdin and client.stderr
    client.stdin.write(question.encode())
    client.stdin.close()
    received = b""
    if by_signal:
        received = os.read(reading, PIPE_BYTES)
        client.send_signal(signal.SIGSTOP)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        most = max(most, rss_bytes(served.record.pid))
    client.send_signal(signal.SIGCONT)
    while piece := os.read(reading, 65536):
        received += piece
    os.close(reading)
    return received[filled:].decode(), client.wait(), client.stderr.read().decode().strip(), most - before


def trial(served: Served, question: str, seconds: float, *, by_signal: bool) -> Trial:
    """One stopped reader beside the others."""
    submissions = questions(OTHERS)
    with streaming(served.record, submissions, solo(served.record, submissions)) as seen:
        text, exit_code, said, held = ask_and_stop(served, question, seconds, by_signal=by_signal)
    return Trial(text.removesuffix("\n"), exit_code, said, seen, held)


def calm(served: Served, seconds: float) -> Seen:
    """The others alone."""
    submissions = questions(OTHERS)
    with streaming(served.record, submissions, solo(served.record, submissions)) as seen:
        time.sleep(seconds)
    return seen


def right_answer(served: Served, question: str) -> str:
    """What a reader that is not stopped gets."""

    async def ask() -> str:
        with await connect(served.record) as client:
            return await answer(client, Submission([{"role": "user", "content": question}]))

    return asyncio.run(ask())


def judge(name: str, found: Trial, p50: float, whole: str) -> list[str]:
    """Print a trial; its faults."""
    now = percentile(found.seen.gaps, 50)
    is_whole = found.text == whole and found.exit_code == 0
    got = (
        "the whole text"
        if is_whole
        else f"{len(found.text)} of {len(whole)} characters, exit {found.exit_code}, {found.said!r}"
    )
    print(
        f"{name}: {got}; the daemon held {found.held / 2**20:.2f} MiB more at most; others' words p50 {p50 * 1e3:.1f} -> {now * 1e3:.1f} ms "
        f"({100 * (now / p50 - 1):+.1f} %), p99 {percentile(found.seen.gaps, 99) * 1e3:.1f} ms, {len(found.seen.wrong)} of their "
        f"{found.seen.answers} answers wrong",
        flush=True,
    )
    faults = [] if is_whole else [f"{name}: not the whole text"]
    faults += [] if found.held < HELD else [f"{name}: {found.held} bytes held"]
    faults += [] if now < p50 * (1 + SHARE) else [f"{name}: the others became slower"]
    return faults + found.seen.faults + (["others' answers differ"] if found.seen.wrong else [])


def main(args: list[str]) -> int:
    """Run both trials with a daemon of their own."""
    own, words = chosen(args, STOP_S="30")
    seconds = float(own["STOP_S"])
    with served(*(words or ["HOLD=echo"]), delay=ECHO_DELAY) as daemon:
        short, long = right_answer(daemon, SHORT), right_answer(daemon, LONG)
        before = calm(daemon, min(CALM_S, seconds))
        blocked = trial(daemon, LONG, seconds, by_signal=False)
        stopped = trial(daemon, SHORT, seconds, by_signal=True)
        p50 = percentile(before.gaps + calm(daemon, min(CALM_S, seconds)).gaps, 50)
        faults = judge("output blocked", blocked, p50, long)
        faults += judge("stopped, the answer short", stopped, p50, short)
        # What is not done when a client is taken for dead is cancelled: told, and not judged.
        judge("stopped, the answer long", trial(daemon, LONG, seconds, by_signal=True), p50, long)
        if faults:
            print("\n".join(["FAILED", *faults, daemon.said()]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
