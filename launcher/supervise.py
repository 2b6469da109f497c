"""Start the processes of a run through accelerate's launcher, look after them, and say in one block what went wrong.

What accelerate and torchrun do is theirs: they start the processes and end the others when one fails. Added here: a signal
reaches every process of this machine (the launcher would give them 30 s and kill them), the exit code says what happened,
a process that stopped answering is named, and a run out of memory goes on with a smaller micro-batch. Free of torch.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from launcher import failures, rundir
from launcher.beat import EVERY_S, FreshFiles, Watchdog, read_sign
from launcher.errors import EXIT_OURS, EXIT_STOPPED, EXIT_USAGE
from launcher.failures import ATTEMPT, Failure, block
from launcher.plan import Plan, halve
from launcher.rundir import logs_dir
from launcher.stopping import SIGNALS

POLL_S = 0.1
# How long the others may take to end by themselves once one has failed.
GRACE_S = 5.0
# How torchrun tells that a signal ended a process: the one it noticed first, and each one in the report at its end.
FIRST_KILLED = re.compile(r"failed \(exitcode: -(?P<number>\d+)\) local_rank: (?P<rank>\d+)")
KILLED = re.compile(r"\(local_rank: (?P<rank>\d+)\)\s+exitcode\s*: -(?P<number>\d+)")
_PR_SET_PDEATHSIG = 1


def run(decided: Plan, run_dir: Path, timeout_s: float) -> int:
    """Run the plan to its end, whatever that is; returns the exit code.

    Raises `UserError` if another training writes into that folder.
    """
    first = decided.ranks[0]
    if first == 0:
        # What our first process will hold, asked for before anything is started.
        with rundir.locked(run_dir):
            pass
    logs = logs_dir(run_dir)
    # The files in logs/ are watched, so no second supervisor may let its processes write there.
    with rundir.locked(run_dir, f"{logs.name}/lock-of-rank-{first}"):
        return _attempt(decided, logs, timeout_s)


def _attempt(decided: Plan, logs: Path, timeout_s: float) -> int:
    """Start the processes, and again with a smaller micro-batch while they run out of memory."""
    attempt, fresh = 0, FreshFiles(logs)
    while True:
        group = Processes(decided, logs, fresh, attempt, timeout_s)
        with group.signals_received():
            code = group.wait()
        failure = group.failure()
        if failure is None or code == 0 or failure.kind == "stopped":
            return code if failure is None or code == 0 else EXIT_STOPPED
        smaller = halve(decided) if failure.kind == "memory" else None
        if smaller is None:
            print("\n".join(block(failure, logs)), file=sys.stderr)
            return EXIT_USAGE if failure.kind in ("user", "memory") else EXIT_OURS
        print(
            f"rank {failure.rank} ran out of memory at {failure.doing}; going on from the last checkpoint with "
            f"{smaller.micro} x {smaller.accumulation} x {smaller.world} instead of "
            f"{decided.micro} x {decided.accumulation} x {decided.world}, the same examples a step",
            flush=True,
        )
        decided, attempt = smaller, attempt + 1


@dataclass
class Processes:
    """One attempt: accelerate's launcher and the processes of this machine below it."""

    decided: Plan
    logs: Path
    fresh: FreshFiles
    attempt: int
    timeout_s: float
    signals: list[int] = field(default_factory=list)
    stuck: Failure | None = None
    has_killed: bool = False

    def __post_init__(self) -> None:
        for rank in self.decided.ranks:
            for old in (f"rank-{rank}.beat", f"rank-{rank}.failure.json"):
                (self.logs / old).unlink(missing_ok=True)
        environment = {**os.environ, **self.decided.env, ATTEMPT: str(self.attempt)}
        with self._launcher_log.open("wb") as log:
            # A group of its own: Ctrl-C at the terminal reaches us, and the launcher only through us.
            self.launcher = subprocess.Popen(
                self.decided.argv, env=environment, stdin=subprocess.DEVNULL, stderr=log, process_group=0,
                preexec_fn=_end_with_parent,
            )  # fmt: skip

    @contextlib.contextmanager
    def signals_received(self) -> Iterator[None]:
        """While this lasts, signals are collected and not obeyed."""
        before = {number: signal.signal(number, lambda number, _: self.signals.append(number)) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self) -> int:
        """Hand on signals and watch, until the launcher has ended; returns the exit code."""
        watchdog, handed_on, failed_at, looked_at = Watchdog(self.fresh, self.timeout_s), 0, None, 0.0
        while self.launcher.poll() is None:
            time.sleep(POLL_S)
            now = time.monotonic()
            for number in self.signals[handed_on:]:
                self._send(number)
                handed_on += 1
            if now - looked_at < EVERY_S:
                continue  # the files may lie on another machine, and are written no more often
            looked_at = now
            if failed_at is None and failures.read(self.fresh, self.attempt):
                failed_at = now
            if self.stuck is None and (found := watchdog.look(now)):
                self.stuck = self._describe(*found)
            if self.stuck or (failed_at is not None and now - failed_at > GRACE_S):
                self.has_killed = True
                self._send(signal.SIGKILL)
        return 128 + self.signals[1] if len(self.signals) > 1 else self.launcher.returncode

    def failure(self) -> Failure | None:
        """What ended this attempt, None if nothing did."""
        if self.stuck or self.launcher.returncode == 0 or len(self.signals) > 1:
            return self.stuck
        told = failures.read(self.fresh, self.attempt)
        first = next((failure for failure in told if failure.kind != "stopped"), None)
        if first is not None and not first.is_echo:
            return first
        return (
            (told[0] if told and first is None else None) or self._ended_silently() or first or self._launcher_failed()
        )

    def _ended_silently(self) -> Failure | None:
        """A process that left no record: a signal ended it."""
        log = self._log()
        # Of two that ended between two of its looks torchrun takes the lower rank for the first; and it ends others itself,
        # by a signal that asks them to stop.
        by_itself = (found for found in KILLED.finditer(log) if int(found["number"]) not in SIGNALS)
        found = next(by_itself, None) or FIRST_KILLED.search(log)
        if not found or self.has_killed:
            return None
        number, rank = int(found["number"]), self.decided.ranks[int(found["rank"])]
        if number in SIGNALS:
            print("stopped before the first step, nothing was lost; run the same command again")
            return Failure(rank, socket.gethostname(), "stopped", "starting", "")
        name = signal.Signals(number).name
        sign = read_sign(self.logs / f"rank-{rank}.beat")
        return Failure(rank, socket.gethostname(), "error", sign.doing if sign else "its start", f"ended by {name}")

    def _launcher_failed(self) -> Failure:
        """The launcher itself failed, or it was told to stop before it had started anything."""
        if self.signals:
            print("stopped before the first step, nothing was lost; run the same command again")
            return Failure(0, socket.gethostname(), "stopped", "starting", "")
        lines = [line.strip() for line in self._log().splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        message = (errors or lines or [f"accelerate's launcher ended with {self.launcher.returncode}"])[-1]
        return Failure(
            self.decided.ranks[0], socket.gethostname(), "error", f"its start (see {self._launcher_log})", message
        )

    def _describe(self, rank: int, doing: str) -> Failure:
        """A process that stopped answering, in the form of a failure."""
        message = f"stopped answering for {self.timeout_s:g} s (parallel.timeout_s)"
        return Failure(rank, self._host(rank), "error", doing, message)

    def _host(self, rank: int) -> str:
        return socket.gethostname() if rank in self.decided.ranks else "another machine"

    @property
    def _launcher_log(self) -> Path:
        """What the launcher itself says; every machine has its own."""
        return self.logs / f"launcher-of-rank-{self.decided.ranks[0]}.log"

    def _log(self) -> str:
        with contextlib.suppress(OSError):
            return self._launcher_log.read_text(encoding="utf-8", errors="replace")
        return ""

    def _send(self, number: int) -> None:
        """To every process of this machine; to the launcher where there is none yet, and when all shall end."""
        try:
            workers = psutil.Process(self.launcher.pid).children()
        except psutil.NoSuchProcess:
            return
        for process in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if not workers:
            self.launcher.send_signal(number)


def _end_with_parent() -> None:
    """In the launcher: if we are killed outright, the kernel tells it to stop its processes, which save and leave."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM.value)
