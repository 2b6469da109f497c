"""Throw everything but sense at a daemon that answers eight good clients, and see whether one of them, or it, takes harm.

    python -m tests.stress.fuzz [SEED=0] [MESSAGES=100000] [FLAT=yes] [RUN=… | HOLD=echo] [serve.name=value …]

The attacks are in `attacks.py`, drawn from the seed. Beside them connections vanish in the middle of answers, some never
read, and strangers write random bytes to the sockets. Fails unless every good answer equals the one that was given when nobody
else was there, every kind of attack was tried and answered (frames that are no message are not), none by a mistake of the
daemon's, all processes are still the same ones, no request ended twice, nothing is left open, and memory is flat (FLAT=no only
prints it: in a short trial it is not settled).
"""

import contextlib
import random
import socket
import time
from collections import Counter

import zmq

from bench.daemon import Served, questions, served, table
from serve.engines import rss_bytes
from serve.figures import percentile
from serve.protocol import VERSION, Code, Kind, ProtocolError, decode
from tests.stress.attacker import DATA, Draw, Pair, frames
from tests.stress.attacks import ATTACKS, greetings, random_bytes, wrong_frames
from tests.stress.program import begin, finish, run_program
from tests.stress.streams import Seen, solo, streaming

STREAMS = 8
PAIRS = 6
# Pairs of which nobody reads what the daemon answers.
MUTE = 2
# So many messages between two looks at the answers, and between two that vanish.
LOOK, VANISH = 25, 100
ECHO_DELAY = 0.02
MOST_A_SECOND = 400.0
FLAT = 0.05
PATIENCE_MS = 120_000
SETTLE_S = 60.0
NO_MESSAGE = (random_bytes.__name__, wrong_frames.__name__)


class Fuzzer:
    """Sends attacks to a daemon and keeps count of what it says."""

    def __init__(self, served: Served, draw: random.Random) -> None:
        self.served, self.draw = served, Draw(draw)
        self.sent: Counter[str] = Counter()
        self.answers: dict[str, Counter[str]] = {name: Counter() for name in ATTACKS}
        self.terminals: Counter[bytes] = Counter()
        self.pongs: list[float] = []
        self._next = time.monotonic()
        self._attack_of: dict[bytes, str] = {}
        self._context = zmq.Context()
        self._pairs = [Pair(self._context, served) for _ in range(PAIRS)]
        self._leaving: list[Pair] = []
        self._strangers: list[socket.socket] = []
        self._watch = self._context.socket(zmq.DEALER)
        self._watch.connect(served.record.control)
        self._watch.send_multipart(frames(b"H", bytes(16), {"proto": [VERSION]}))
        self._watch.recv_multipart()

    def attack(self, number: int) -> None:
        """Send one message, and now and then look, vanish and write bytes to the bare socket."""
        name = self.draw.random.choice(list(ATTACKS))
        lane, message = ATTACKS[name](self.draw)
        request = message[2] if len(message) > 2 else b""
        self._attack_of[request] = name
        pair = self.draw.random.choice(self._pairs)
        while not pair.send(lane, message):
            self.look()
        self.sent[name] += 1
        if name in (greetings.__name__, "oversize"):
            pair.hello()
        if number % LOOK == 0:
            self.look()
        if number % VANISH == 0:
            self.vanish()
            self.stranger()

    def look(self) -> None:
        """Read what came, and wait until the daemon answers a PING: it is not to be drowned but to be confused."""
        self._next = max(self._next + LOOK / MOST_A_SECOND, time.monotonic() - LOOK / MOST_A_SECOND)
        time.sleep(max(self._next - time.monotonic(), 0))
        begun = time.monotonic()
        self._watch.send_multipart(frames(b"?", bytes(16), {}))
        assert self._watch.poll(PATIENCE_MS), f"no PONG within {PATIENCE_MS} ms: {self.served.said()}"
        self._watch.recv_multipart()
        self.pongs.append(time.monotonic() - begun)
        for pair in self._pairs[MUTE:]:
            for message in pair.received():
                self._count(message)

    def _count(self, message: list[bytes]) -> None:
        try:
            said = decode(message)
        except ProtocolError as fault:
            raise AssertionError(f"the daemon said {message!r}") from fault
        name = self._attack_of.get(said.request)
        if said.kind is Kind.WELCOME:
            self.draw.sessions = [*self.draw.sessions[-20:], said.body["session"]]
        elif name is not None:
            self.answers[name][said.body.get("code", said.kind.name)] += 1
        if said.kind in (Kind.DONE, Kind.ERROR) and name == "honest":
            self.terminals[said.request] += 1

    def vanish(self) -> None:
        """The pair that vanished last time is gone for good; another one does, in the middle of an answer."""
        for pair in self._leaving:
            pair.close()
        pair = self._pairs.pop(self.draw.random.randrange(len(self._pairs)))
        pair.hello()
        long = {**self.draw.body("adiós " * 40), "max_tokens": None}
        pair.send(DATA, frames(b"S", self.draw.random.randbytes(16), long))
        self._leaving = [pair]
        self._pairs.append(Pair(self._context, self.served))

    def stranger(self) -> None:
        """Random bytes to the bare socket, sometimes after a beginning that looks right; some stay connected."""
        if len(self._strangers) > 5:
            self._strangers.pop(0).close()
        path = self.served.record.data.removeprefix("ipc://")
        stranger = socket.socket(socket.AF_UNIX)
        self._strangers.append(stranger)
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(55, b"\0")
        with contextlib.suppress(OSError):
            stranger.connect(path)
            stranger.sendall(self.draw.random.choice((b"", greeting, greeting[:20])) + self.draw.noise(5000))

    def close(self) -> None:
        """Vanish altogether."""
        for stranger in self._strangers:
            stranger.close()
        self._context.destroy(linger=0)


def fuzz(served: Served, own: dict[str, str]) -> tuple[list[str], str]:
    """Run the trial, print what happened; the faults that were found, and a summary."""
    messages, draw = int(own["MESSAGES"]), random.Random(int(own["SEED"]))
    submissions = questions(STREAMS)
    expected = solo(served.record, submissions)
    pids, begun = served.pids, time.monotonic()
    memory: dict[int, list[int]] = {pid: [] for pid in pids}
    fuzzer = Fuzzer(served, draw)
    with streaming(served.record, submissions, expected) as seen:
        for number in range(1, messages + 1):
            fuzzer.attack(number)
            if number % max(messages // 200, 1) == 0:
                for pid in pids:
                    memory[pid].append(rss_bytes(pid))
    fuzzer.close()
    seconds = time.monotonic() - begun
    print(table(("attack", "sent", "answered"), rows_of(fuzzer)), flush=True)
    faults = [f"{name}: sent {fuzzer.sent[name]} times, never answered" for name in unanswered(fuzzer)]
    faults += [
        f"{name}: a mistake of the daemon's" for name, said in fuzzer.answers.items() if said[Code.INTERNAL.value]
    ]
    faults += [f"{len(seen.wrong)} good answers differ, first: {seen.wrong[0]}"] if seen.wrong else []
    faults += seen.faults + ([] if len(seen.ends) >= STREAMS else [f"only {len(seen.ends)} good answers"])
    faults += [f"processes were {pids} and are {served.pids}"] if served.pids != pids else []
    twice = sum(count > 1 for count in fuzzer.terminals.values())
    faults += [f"{twice} requests ended more than once"] if twice else []
    faults += left_open(served)
    growths = [fault for pid in pids for fault in grown(pid, memory[pid])]
    faults += growths if own["FLAT"] == "yes" else []
    print(speeds(fuzzer, seen, seconds))
    kinds = f"{messages} messages of {len(fuzzer.sent)} kinds"
    return faults, f"{kinds}; {len(seen.ends)} good answers, {len(seen.wrong)} of them different"


def unanswered(fuzzer: Fuzzer) -> list[str]:
    """The kinds of attack that the daemon has said nothing to, but for those without an id to answer to."""
    return [name for name, answers in fuzzer.answers.items() if not answers and name not in NO_MESSAGE]


def rows_of(fuzzer: Fuzzer) -> list[tuple[str, int, str]]:
    """The kinds of attack: times sent, answers of the daemon."""
    return [
        (name, fuzzer.sent[name], ", ".join(f"{count} {what}" for what, count in fuzzer.answers[name].most_common()))
        for name in ATTACKS
    ]


def speeds(fuzzer: Fuzzer, seen: Seen, seconds: float) -> str:
    """The speed of the daemon meanwhile, in words."""
    (_, gaps), pongs = seen.between(), fuzzer.pongs
    return (
        f"{seconds:.0f} s; between the words of good answers p50 {percentile(gaps, 50) * 1e3:.0f} ms, p99 "
        f"{percentile(gaps, 99) * 1e3:.0f} ms, longest {max(gaps):.2f} s; PONG after p50 {percentile(pongs, 50) * 1e3:.1f} ms, "
        f"p99 {percentile(pongs, 99) * 1e3:.0f} ms, longest {max(pongs):.2f} s"
    )


def left_open(served: Served) -> list[str]:
    """A fault if a slot is busy or a request waits after everybody has gone."""
    context = zmq.Context()
    control = context.socket(zmq.DEALER)
    control.connect(served.record.control)
    control.send_multipart(frames(b"H", bytes(16), {"proto": [VERSION]}))
    end, status = time.monotonic() + SETTLE_S, {"busy_slots": -1, "waiting": -1}
    while time.monotonic() < end and status["busy_slots"] + status["waiting"] != 0:
        control.send_multipart(frames(b"T", bytes(16), {}))
        while (said := decode(control.recv_multipart())).kind is not Kind.STATUS:
            pass
        status = said.body
        time.sleep(0.1)
    context.destroy(linger=0)
    print(
        f"afterwards: {status['busy_slots']} busy slots, {status['waiting']} waiting, {status.get('clients')} clients"
    )
    return [] if status["busy_slots"] + status["waiting"] == 0 else [f"left open: {status}"]


def grown(pid: int, samples: list[int]) -> list[str]:
    """Compare the memory of the tenth after the first with that of the last, medians; print every tenth's."""
    size = max(len(samples) // 10, 1)
    tenths = [percentile(samples[start : start + size], 50) for start in range(0, len(samples), size)]
    early, late = percentile(samples[size : 2 * size], 50), percentile(samples[-size:], 50)
    told = " ".join(f"{value / 1e6:.1f}" for value in tenths)
    print(
        f"process {pid}: MB in every tenth {told} ({100 * (late / early - 1):+.1f} %), at most {max(samples) / 1e6:.1f}"
    )
    return [f"process {pid} grew from {early:.0f} to {late:.0f} bytes"] if abs(late / early - 1) > FLAT else []


def main(args: list[str]) -> int:
    """Run the trial with a daemon of its own."""
    own, words = begin(args, has_daemon=True, MESSAGES="100000", FLAT="yes")
    with served(*(words or ["HOLD=echo"]), delay=ECHO_DELAY) as daemon:
        faults, summary = fuzz(daemon, own)
        return finish(faults, summary, daemon.said())


if __name__ == "__main__":
    run_program(main)
