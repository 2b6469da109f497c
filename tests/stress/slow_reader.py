"""Stop a reader in the middle of its answer: it must lose no word, and nobody else must notice.

    python -m tests.stress.slow_reader [SEED=0] [STOP_S=30] [DELAY=0.02] [RUN=… | HOLD=echo] [serve.name=value …]

Three readers, one after the other. The first is `chat | (sleep 30; cat)`: its output blocks, its process lives. The others are stopped
outright (SIGSTOP), so that they cannot even say that they live: one whose answer is done before the daemon takes it for dead, and
one whose answer is longer and may therefore be cut off. Meanwhile four good clients are answered, with questions that SEED numbers.
Fails unless the first two get their whole text, the third gets it or is told that it does not, the daemon holds less than 4 MiB
more for any of them, and the others are answered meanwhile, and rightly. Their speed is printed, beside that of the time before, and not judged.
"""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from bench.daemon import Served, questions, served
from serve.client import connect
from serve.engines import rss_bytes
from serve.figures import percentile
from serve.submission import Submission
from tests.stress.program import begin, finish, run_program
from tests.stress.streams import Seen, answer, solo, streaming

OTHERS, OTHERS_TOKENS = 4, 48
# If nobody else is answered for so long, nobody will be.
HANGS_S = 60.0
CALM_S = 15.0
HELD = 4 * 2**20
# One page is the least that a pipe can be; filled but for so much, an answer does not fit.
PIPE_BYTES, ROOM = 4096, 64
SHORT = "Tell me something short about lighthouses: " + "y más ñ 🦊 " * 5
LONG = "Tell me everything about lighthouses, from the first fire on a hill to the last keeper: " + "y más ñ 🦊 " * 40

# (name, question, whether its process is stopped).
READERS = (
    ("output blocked", LONG, False),
    ("stopped, the answer short", SHORT, True),
    ("stopped, the answer long", LONG, True),
)


@dataclass
class Reader:
    """A reader that stood still from `begun` to `ended`: the text it got in the end, its exit code and its last words.

    `held` is how many bytes more the daemon had at most.
    """

    begun: float
    ended: float
    is_in_the_middle: bool
    text: str
    exit_code: int
    said: str
    held: int

    def faults(self, whole: str, *, may_be_cut: bool) -> list[str]:
        """The ways in which it was not served as it should be; `whole` is the right answer."""
        is_whole = self.text == whole and self.exit_code == 0
        is_cut = may_be_cut and whole.startswith(self.text) and self.exit_code != 0 and bool(self.said)
        got = f"{len(self.text)} of {len(whole)} characters, exit {self.exit_code}, {self.said!r}"
        print(f"{'the whole text' if is_whole else got}; the daemon held {self.held / 2**20:.2f} MiB more at most")
        faults = [] if is_whole or is_cut else [f"got {got}"]
        faults += [] if self.is_in_the_middle else ["was not stopped in the middle of its answer"]
        return faults + ([] if self.held < HELD else [f"the daemon held {self.held} bytes more"])


def num_answers(question: str) -> int:
    """Answers of the others after which the echo of a question has been made: each step gives everybody one token."""
    return len(question.encode()) * OTHERS // OTHERS_TOKENS + OTHERS


def ask_and_stop(served: Served, others: Seen, question: str, seconds: float, *, by_signal: bool) -> Reader:
    """Ask through a pipe whose end is not read for so long, and until the answer is there if others are answered."""
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
    begun, answered = time.monotonic(), others.num_ended
    while time.monotonic() < begun + seconds or (
        others.num_ended < answered + num_answers(question) and time.monotonic() < begun + seconds + HANGS_S
    ):
        time.sleep(0.05)
        most = max(most, rss_bytes(served.record.pid))
    ended, is_in_the_middle = time.monotonic(), client.poll() is None
    client.send_signal(signal.SIGCONT)
    while piece := os.read(reading, 65536):
        received += piece
    os.close(reading)
    text = received[filled:].decode().removesuffix("\n")
    said = client.stderr.read().decode().strip()
    return Reader(begun, ended, is_in_the_middle, text, client.wait(), said, most - before)


def right_answer(served: Served, question: str) -> str:
    """The answer of a reader that is not stopped."""

    async def ask() -> str:
        with await connect(served.record) as client:
            return await answer(client, Submission([{"role": "user", "content": question}]))

    return asyncio.run(ask())


def speeds(seen: Seen, calm: tuple[float, float], readers: dict[str, Reader]) -> str:
    """The speed of the others' answers, before anybody was stopped and meanwhile, in words."""
    _, before = seen.between(*calm)
    p50, told = percentile(before, 50), []
    for name, reader in readers.items():
        _, gaps = seen.between(reader.begun, reader.ended)
        change = 100 * (percentile(gaps, 50) / p50 - 1)
        told.append(f"{name} {change:+.1f} %, p99 {percentile(gaps, 99) * 1e3:.1f} ms")
    return f"between the others' words p50 {p50 * 1e3:.1f} ms, p99 {percentile(before, 99) * 1e3:.1f} ms; {'; '.join(told)}"


def main(args: list[str]) -> int:
    """Stop all three, beside the same four good clients, with a daemon of their own."""
    own, words = begin(args, has_daemon=True, STOP_S="30", DELAY="0.02")
    seconds, faults, readers = float(own["STOP_S"]), list[str](), dict[str, Reader]()
    others = questions(OTHERS, OTHERS_TOKENS, first=OTHERS * int(own["SEED"]))
    with served(*(words or ["HOLD=echo"]), delay=float(own["DELAY"])) as daemon:
        expected = solo(daemon.record, others)
        right = {question: right_answer(daemon, question) for question in (SHORT, LONG)}
        with streaming(daemon.record, others, expected) as seen:
            begun = time.monotonic()
            time.sleep(min(CALM_S, seconds))
            calm = (begun, time.monotonic())
            for name, question, by_signal in READERS:
                print(f"{name}: ", end="", flush=True)
                readers[name] = ask_and_stop(daemon, seen, question, seconds, by_signal=by_signal)
                # If the long one is not done when its client is taken for dead, it is cancelled.
                is_long = by_signal and question == LONG
                faults += [f"{name}: {f}" for f in readers[name].faults(right[question], may_be_cut=is_long)]
        meanwhile = {name: seen.between(reader.begun, reader.ended)[0] for name, reader in readers.items()}
        faults += [f"{name}: nobody else was answered meanwhile" for name, number in meanwhile.items() if not number]
        faults += [f"another's answer differs: {seen.wrong[0]}"] if seen.wrong else []
        faults += seen.faults
        print(speeds(seen, calm, readers))
        held = max(reader.held for reader in readers.values()) / 2**20
        return finish(
            faults,
            f"3 readers stopped for {seconds:g} s, {sum(meanwhile.values())} answers to others meanwhile, {held:.2f} MiB more held at most",
            daemon.said(),
        )


if __name__ == "__main__":
    run_program(main)
