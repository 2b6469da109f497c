"""Signs of life of the processes of one run: `logs/rank-<n>.beat`, rewritten every second. Free of torch.

A line `<seconds alive> <moves> <ticks> <what it does>`. All processes make the same moves; one that hangs stops, and the
others soon wait for it: the one with the fewest moves is the one they wait for. Ticks are what one process does alone while
the others wait, and seconds of loading. One that was stopped or has lost its machine does not even count seconds.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 1.0
# Places where a process reads gigabytes from wherever they lie, or waits for others that do: nobody can say how long.
LOADING = ("joining the other processes", "loading the base", "reading the adapter back")


class Beat:
    """The beat of this process, written by a thread. `file` None: there is nobody to see it.

    `step` is the step of the training, None before the first.
    """

    def __init__(self, file: Path | None) -> None:
        self.step: int | None = None
        self._file = file
        self._moves = self._ticks = 0
        self._doing = "starting"
        if file:
            self._write(0)
            threading.Thread(target=self._run, daemon=True, name="beat").start()

    def at(self, doing: str) -> None:
        """Say what is done now. All processes pass the same places in the same order."""
        self._moves += 1
        self._doing = doing

    def tick(self) -> None:
        """Say that long work goes on."""
        self._ticks += 1

    @property
    def doing(self) -> str:
        """What is done now, and in which step."""
        return self._doing if self.step is None else f"step {self.step}, {self._doing}"

    def _run(self) -> None:
        started = time.monotonic()
        while True:
            time.sleep(EVERY_S)
            if self._doing in LOADING:
                self.tick()
            self._write(int(time.monotonic() - started))

    def _write(self, seconds: int) -> None:
        assert self._file
        part = self._file.with_suffix(".part")
        # A full disk must not end the thread: it says nothing for a while, and goes on.
        with contextlib.suppress(OSError):
            part.write_text(f"{seconds} {self._moves} {self._ticks} {self.doing}\n", encoding="utf-8")
            part.replace(self._file)


class FreshFiles:
    """The files of a folder that were written since this was made: what earlier runs left there does not count.

    A file is compared with itself, never with a clock: those of several machines may differ.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._left = dict(self._written(folder.iterdir()))

    def glob(self, pattern: str) -> Iterator[Path]:
        """Like `Path.glob`."""
        for file, written in self._written(self._folder.glob(pattern)):
            if self._left.get(file) != written:
                yield file

    @staticmethod
    def _written(files: Iterator[Path]) -> Iterator[tuple[Path, int]]:
        """Each file and when it was last written, in nanoseconds."""
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # it was replaced just now
                yield file, file.stat().st_mtime_ns


@dataclass(frozen=True)
class Sign:
    """What a process last said."""

    seconds: int
    moves: int
    ticks: int
    doing: str


@dataclass
class _Seen:
    sign: Sign
    alive_at: float
    moved_at: float


class Watchdog:
    """Looks at the beats of all processes and names the one that stopped answering.

    Its clock is its own monotonic one: the clocks of several machines may differ, and any of them may jump.
    """

    def __init__(self, logs: Path | FreshFiles, timeout_s: float) -> None:
        self._logs = logs
        self._timeout_s = timeout_s
        self._seen: dict[int, _Seen] = {}

    def look(self, now: float) -> tuple[int, str] | None:
        """(rank, what it was doing) once no process has moved for the time-out; None while the run moves."""
        for file in self._logs.glob("rank-*.beat"):
            rank = int(file.stem.removeprefix("rank-"))
            sign = read_sign(file)
            if sign is None:
                continue
            seen = self._seen.setdefault(rank, _Seen(sign, now, now))
            if sign.seconds != seen.sign.seconds:
                seen.alive_at = now
            if (sign.moves, sign.ticks) != (seen.sign.moves, seen.sign.ticks):
                seen.moved_at = now
            seen.sign = sign
        # Until one has its libraries, its data and its weights there is no saying how long that takes.
        has_begun = any(seen.sign.moves for seen in self._seen.values())
        if not has_begun or any(now - seen.moved_at < self._timeout_s for seen in self._seen.values()):
            return None
        silent = {rank: seen for rank, seen in self._seen.items() if now - seen.alive_at > 10 * EVERY_S}
        rank = min(silent or self._seen, key=lambda rank: (self._seen[rank].sign.moves, rank))
        doing = self._seen[rank].sign.doing
        return rank, f"{doing}; its process does not answer at all" if rank in silent else doing


def read_sign(file: Path) -> Sign | None:
    """The last sign of life in a file; None where there is none that can be read."""
    try:
        seconds, moves, ticks, doing = file.read_text(encoding="utf-8").strip().split(" ", 3)
        return Sign(int(seconds), int(moves), int(ticks), doing)
    except (OSError, ValueError):
        return None
