"""What the tests of `serve/` share: a daemon with the echo engine in a subprocess, a raw client, a pseudo-terminal."""

import contextlib
import fcntl
import json
import os
import pty
import re
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

import pytest
import zmq

from serve.protocol import Kind, Message, decode, encode
from serve.runtime import Record

ROOT = Path(__file__).parent.parent


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """The first true value of `condition`, asked 50 times a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{condition} stayed false for {seconds} s")


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


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

    def start(self, *words: str, **extra: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
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

    def run(self, *words: str, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "serve", *words],
            cwd=self.work,
            env=self.environment(**extra),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def daemon(self, delay: float = 0.0, *words: str) -> subprocess.Popen[str]:
        process = self.start("daemon", "HOLD=echo", *words, AFINAR_ECHO_DELAY=str(delay))
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: ")
        return process

    def record(self, name: str = "echo") -> Record:
        fields = json.loads((self.runtime / f"{name}.json").read_text())
        return Record(**{**fields, "runs": tuple(fields["runs"])})

    def events(self, name: str = "echo") -> list[dict[str, Any]]:
        lines = (self.runtime / f"{name}.events.log").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def left(self) -> set[str]:
        """What lies in the runtime directory, locks and logs aside."""
        return {p.name for p in self.runtime.glob("*") if p.suffix not in (".lock", ".log")}

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for path in self.runtime.glob("*.json"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)


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

    def receive(self, lane: str, seconds: float = 5.0) -> Message:
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

    def collect(self, request: bytes, seconds: float = 10.0) -> tuple[list[Message], Message]:
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
    """A program (`through`: another command) in a real pseudo-terminal; `text` is what it wrote, without escapes."""

    ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")

    def __init__(self, box: Box, *words: str, through: tuple[str, ...] = (), **extra: str) -> None:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.master = master
        self.raw = b""

        def take_terminal() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            through or [sys.executable, "-m", "serve", *words],
            cwd=box.work,
            env=box.environment(**extra),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    @property
    def text(self) -> str:
        return self.ESCAPES.sub("", self.raw.decode(errors="replace")).replace("\r", "")

    def type(self, keys: str) -> None:
        self.raw = b""
        os.write(self.master, keys.encode())

    def expect(self, wanted: str, seconds: float = 8.0) -> str:
        end = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < end, f"{wanted!r} did not appear in {self.text!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.raw += os.read(self.master, 65536)
                except OSError:
                    raise AssertionError(f"{wanted!r} did not appear before the end: {self.text!r}") from None
        return self.text

    def wait(self, seconds: float = 8.0) -> int:
        """Read on until the program has ended; its exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still running: {self.text!r}"
            if select.select([self.master], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    self.raw += os.read(self.master, 65536)
        return self.process.returncode
