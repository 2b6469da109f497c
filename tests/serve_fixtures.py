"""What the tests of `serve/` share: a daemon with the echo engine in a subprocess, a raw client, a pseudo-terminal."""

import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
import zmq

from serve.protocol import Kind, Message, decode, encode
from serve.runtime import Record
from tests.support.zygote import HeavyPopen, WarmPopen

ROOT = Path(__file__).parent.parent


# How long is waited for what is bound to come: no speed is measured, and a busy machine takes its time.
PATIENCE = 60.0


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of `condition`, asked 50 times a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{condition} stayed false for {seconds} s")


def children(pid: int) -> list[int]:
    """The direct children of a process, but for its zygote."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(pid) for pid in pids if Path(f"/proc/{pid}/comm").read_text() != "zygote\n"]


def _is_at_work(pid: int) -> bool:
    with contextlib.suppress(OSError):
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        return any(stat.rpartition(") ")[2][0] in "RD" for stat in stats)
    return False


def _popen(words: tuple[str, ...], work: Path) -> type[WarmPopen]:
    """Who starts `python -m serve WORDS`: a zygote with torch where a real run is named."""
    values = " ".join(word.partition("=")[2] for word in words if word.startswith(("RUN=", "RUNS=")))
    folders = [work / place / run for run in values.split() for place in ("", "runs")]
    return HeavyPopen if any((folder / "run.json").is_file() for folder in folders) else WarmPopen


# A step of the echo engine lasts for as long as there is a file `hold`; that there is such a step tells the file `held`.
HELD_STEPS = """
import sys, time
from pathlib import Path
if "serve.engine_process" in sys.orig_argv:
    sleep, folder = time.sleep, Path({folder!r})
    def held(_):
        while sys._getframe(1).f_code.co_name == "step" and (folder / "hold").exists():
            (folder / "held").touch()
            sleep(0.01)
    time.sleep = held
"""


class Box:
    """A home and a runtime directory of its own (short: a socket's path is), and the daemons started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = folder / "r"
        self.work = folder / "w"
        self.work.mkdir()
        self.processes: list[subprocess.Popen[str]] = []

    def environment(self, **extra: str) -> dict[str, str]:
        return {
            **os.environ,
            "AFINAR_RUNTIME_DIR": str(self.runtime),
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "TERM": "xterm",
            **extra,
        }

    def start(self, *words: str, cold: bool = False, **extra: str) -> subprocess.Popen[str]:
        """`python -m serve WORDS`, forked by a zygote unless it is `cold`."""
        popen = subprocess.Popen if cold else _popen(words, self.work)
        process = popen(
            [sys.executable, "-m", "serve", *words],
            cwd=self.work,
            env=self.environment(**extra),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *words: str, stdin: str = "", cold: bool = False, **extra: str) -> subprocess.CompletedProcess[str]:
        """The same to its end."""
        process = self.start(*words, cold=cold, **extra)
        out, err = process.communicate(stdin, timeout=2 * PATIENCE)
        return subprocess.CompletedProcess(list(words), process.returncode, out, err)

    def daemon(self, delay: float = 0.0, *words: str, **extra: str) -> subprocess.Popen[str]:
        process = self.start("daemon", "HOLD=echo", *words, AFINAR_ECHO_DELAY=str(delay), **extra)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: ")
        return process

    def daemon_to_hold(self, *words: str) -> subprocess.Popen[str]:
        """A daemon whose engine is as quick as can be, but for the steps that are `held`."""
        (self.folder / "sitecustomize.py").write_text(HELD_STEPS.format(folder=str(self.folder)))
        return self.daemon(0.0, *words, PYTHONPATH=f"{self.folder}:{ROOT}")

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[], bool]]:
        """In here no step of the engine ends; whether it is in one."""
        hold, held = self.folder / "hold", self.folder / "held"
        hold.touch()
        try:
            yield held.exists
        finally:
            hold.unlink()

    def record(self, name: str = "echo") -> Record:
        fields = json.loads((self.runtime / f"{name}.json").read_text())
        return Record(**{**fields, "runs": tuple(fields["runs"])})

    def events(self, name: str = "echo") -> list[dict[str, Any]]:
        lines = (self.runtime / f"{name}.events.log").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def pids(self) -> list[int]:
        """The processes that were started here and what they have started themselves, those that are still there."""
        found = []
        for process in self.processes:
            with contextlib.suppress(OSError):
                found += [process.pid, *children(process.pid)]
        return found

    def left(self) -> set[str]:
        """What lies in the runtime directory, locks and logs aside."""
        return {p.name for p in self.runtime.glob("*") if p.suffix not in (".lock", ".log")}

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for path in self.runtime.glob("*.json"):
            # A daemon may be leaving just now, and takes its file along.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                record = self.record(path.stem)
                if record.is_alive:
                    os.kill(record.pid, signal.SIGKILL)
                    wait_until(lambda record=record: not record.is_alive)


@pytest.fixture
def box() -> Iterator[Box]:
    folder = Path(tempfile.mkdtemp(prefix="af-", dir="/tmp"))
    made = Box(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


class RawClient:
    """Two DEALERs and nothing else: it pings only when told to, and grants no credit."""

    def __init__(self, record: Record, session: bytes = b"") -> None:
        self.context = zmq.Context()
        self.sockets = {}
        for name, endpoint in (("data", record.data), ("control", record.control)):
            self.sockets[name] = self.context.socket(zmq.DEALER)
            self.sockets[name].connect(endpoint)
        self.session = session

    def __enter__(self) -> "RawClient":
        self.send("control", Message(Kind.HELLO, body={"proto": [1], "session": self.session}))
        welcome = self.receive("control")
        assert welcome.kind is Kind.WELCOME
        self.session, self.limits = welcome.body["session"], welcome.body["limits"]
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def send(self, lane: str, message: Message) -> None:
        self.sockets[lane].send_multipart(encode(message))

    def receive(self, lane: str, seconds: float = PATIENCE) -> Message:
        assert self.sockets[lane].poll(seconds * 1e3), f"nothing came on {lane}"
        return decode(self.sockets[lane].recv_multipart())

    def submit(self, text: str, request: bytes = b"", **options: Any) -> bytes:
        request = request or os.urandom(16)
        body = {"messages": [{"role": "user", "content": text}], "session": self.session, **options}
        self.send("data", Message(Kind.SUBMIT, request, body))
        return request

    def ask(self, kind: Kind, **body: Any) -> Message:
        """The reply to a question on control."""
        question = Message(kind, os.urandom(16), body)
        self.send("control", question)
        while (message := self.receive("control")).request != question.request:
            pass
        return message

    def cancel(self, request: bytes) -> None:
        self.send("control", Message(Kind.CANCEL, request))

    def status(self) -> dict[str, Any]:
        self.send("control", Message(Kind.STATUS))
        while (message := self.receive("control")).kind is not Kind.STATUS:
            pass
        return message.body

    def collect(self, request: bytes, seconds: float = PATIENCE) -> tuple[list[Message], Message]:
        """The deltas of a request and its last message."""
        deltas = []
        while True:
            message = self.receive("data", seconds)
            if message.request == request and message.kind is Kind.DELTA:
                deltas.append(message)
            elif message.request == request and message.kind in (Kind.DONE, Kind.ERROR):
                return deltas, message

    def is_quiet(self, seconds: float = 0.3) -> bool:
        return not self.sockets["data"].poll(seconds * 1e3)


def text_of(deltas: list[Message]) -> str:
    assert [d.body["n"] for d in deltas] == list(range(len(deltas)))
    return "".join(d.body["text"] for d in deltas)


class Screen:
    """A program (`through`: another command) in a real pseudo-terminal, seen by a real terminal emulator.

    `text` is all that a user could scroll back to, row by row without the blanks at their ends.
    """

    def __init__(
        self, box: Box, *words: str, through: tuple[str, ...] = (), size: tuple[int, int] = (100, 30), **extra: str
    ) -> None:
        master, slave = pty.openpty()
        self._box = box
        self.master = master
        self.raw = b""
        self.emulator = pyte.HistoryScreen(*size, history=10_000, ratio=1e-9)
        self._stream = pyte.ByteStream(self.emulator)
        self.resize(*size)

        self.process = _popen(words, box.work)(
            through or [sys.executable, "-m", "serve", *words],
            cwd=box.work,
            env=box.environment(**extra),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            takes_terminal=True,
        )
        os.close(slave)

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    @property
    def rows(self) -> list[str]:
        """The history and the screen, without the empty rows at the end."""
        past = ["".join(row[x].data for x in range(self.emulator.columns)) for row in self.emulator.history.top]
        rows = [row.rstrip() for row in [*past, *self.emulator.display]]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    @property
    def text(self) -> str:
        return "\n".join(self.rows)

    @property
    def said(self) -> list[str]:
        """The rows above the prompt."""
        rows = self.rows
        last = max((i for i, row in enumerate(rows) if row.startswith(">")), default=len(rows))
        return rows[:last]

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.emulator.resize(lines, columns)

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read(self, seconds: float) -> bool:
        """Take what the program wrote; False if it has closed the terminal."""
        if select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return False
            self.raw += data
            self._stream.feed(data)
        return True

    def expect(self, wanted: str, seconds: float = PATIENCE) -> str:
        """Read until it can be seen."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < end, f"{wanted!r} did not appear in:\n{self.text}"
            assert self.read(0.1) or wanted in self.text, f"{wanted!r} did not appear before the end:\n{self.text}"
        return self.text

    def ask(self, line: str, wanted: str) -> list[str]:
        """Enter a line, wait until `wanted` appears below it, and give back the rows that came with it."""
        before = len(self.said)
        self.type(f"{line}\r")
        end = time.monotonic() + PATIENCE
        while wanted not in "\n".join(self.said[before + 1 :]):
            assert time.monotonic() < end, f"{wanted!r} did not appear in:\n{self.text}"
            assert self.read(0.1), self.text
        return self.said[before:]

    def settle(self, quiet: float = 0.1, seconds: float = PATIENCE) -> None:
        """Read on until nothing more comes, and the program and its daemons wait for something to do."""
        end = time.monotonic() + seconds
        while select.select([self.master], [], [], quiet)[0] or self.is_at_work:
            assert time.monotonic() < end, f"still drawing:\n{self.text}"
            if not self.read(0.0):
                return

    @property
    def is_at_work(self) -> bool:
        """Whether the program or a daemon computes, would if it had a processor, or waits for the disk."""
        return any(map(_is_at_work, [self.process.pid, *self._box.pids()]))

    def wait(self, seconds: float = PATIENCE) -> int:
        """Read on until the program has ended; its exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still running:\n{self.text}"
            self.read(0.05)
        while self.read(0.0) and select.select([self.master], [], [], 0.0)[0]:
            pass
        return self.process.returncode
