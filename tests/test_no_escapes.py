"""No escape is written where a program reads, or where the user asked for none; not even while a daemon loads."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator

import pytest
import zmq

from serve import runtime
from serve.protocol import Kind, Message, encode
from tests.pipes import PYTHON
from tests.serve_fixtures import Box, Screen, box

__all__ = ["box"]


@contextlib.contextmanager
def loading_daemon(box: Box) -> Iterator[None]:
    """What a client takes for a daemon: it is loading, says so with escapes, and then that it failed."""
    box.runtime.mkdir(mode=0o700)
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    data, control = (f"ipc://{box.runtime}/x.{lane}" for lane in ("data", "control"))
    socket.bind(control)

    def serve() -> None:
        if not socket.poll(8000):
            return
        sender, *_ = socket.recv_multipart()
        welcome = {"proto": 1, "session": b"s", "state": "loading", "epoch": "e", "info": {}, "limits": {}}
        for message in (
            Message(Kind.WELCOME, body=welcome),
            Message(Kind.PROGRESS, body={"stage": "weights\x1b[2J", "done": 1, "total": 2}),
            Message(Kind.ERROR, body={"code": "E_ENGINE", "message": "no\x1b[2J\r", "retryable": False, "detail": {}}),
        ):
            socket.send_multipart([sender, *encode(message)])

    fields = {
        "name": "x",
        "run": "runs/x",
        "hold": "echo",
        "data": data,
        "control": control,
        "epoch": "e",
        "runs": ["x"],
    }
    mine = {"pid": os.getpid(), "started": runtime.start_time(os.getpid()), "admin": "", "server_key": ""}
    (box.runtime / "x.json").touch(mode=0o600)
    (box.runtime / "x.json").write_text(json.dumps({**fields, **mine}))
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        socket.close(linger=0)
        # Not for the box, which ends whoever is named there.
        (box.runtime / "x.json").unlink()


QUIET = {
    "no colour": ("", {"NO_COLOR": "1"}),
    "dumb": ("", {"TERM": "dumb"}),
    "a pipe": ("| cat", {}),
    "a pipe of objects": ("--json | cat", {}),
}


def test_a_terminal_sees_a_bar_while_a_daemon_loads(box: Box) -> None:
    with loading_daemon(box), Screen(box, through=("sh", "-c", f"echo hi | {PYTHON} chat")) as screen:
        screen.expect("error: no\\x1b[2J\\x0d")
        assert screen.wait() == 6
    assert b"\x1b[Kloading: weights\\x1b[2J [####" in screen.raw
    assert b"\x1b[2J" not in screen.raw


@pytest.mark.parametrize("how", QUIET)
def test_no_escape_is_written(box: Box, how: str) -> None:
    words, extra = QUIET[how]
    command = f"set -o pipefail; echo hi | {PYTHON} chat {words}"
    with loading_daemon(box), Screen(box, through=("bash", "-c", command), **extra) as screen:
        screen.expect("error: no\\x1b[2J\\x0d")
        assert screen.wait() == 6
    assert b"\x1b" not in screen.raw
    assert "loading: weights\\x1b[2J\n" in screen.text
