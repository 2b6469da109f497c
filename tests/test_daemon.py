"""A real daemon with a real engine process (the echo engine), spoken to over real sockets."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serve import broker, runtime
from serve.client import connect
from serve.errors import NoDaemonError, RequestError, UserError
from serve.pieces import Delta, Done
from serve.protocol import CREDIT_WINDOW, MAGIC, Kind, Message, decode
from tests.serve_fixtures import PATIENCE, ROOT, Box, RawClient, box, children, text_of, wait_until
from tests.test_hostile import beside_a_daemon

__all__ = ["box"]
LONG = "uno dos tres cuatro cinco seis siete ocho nueve diez " * 4
# An answer of minutes, and a context that holds it: if its slot is free before, something else has ended it.
ENDLESS = "x" * 9000
ROOMY = "serve.context=20000"


def is_idle(client: RawClient) -> bool:
    status = client.status()
    return status["busy_slots"] == 0 and status["waiting"] == 0


def test_one_answer(box: Box) -> None:
    box.daemon()

    async def talk() -> tuple[str, Done]:
        with await connect(box.record()) as client:
            assert client.info["num_slots"] == 8
            pieces = [piece async for piece in client.ask([{"role": "user", "content": "hola ñ 🦊"}])]
        assert isinstance(pieces[-1], Done)
        return "".join(p.text for p in pieces if isinstance(p, Delta)), pieces[-1]

    text, done = asyncio.run(talk())
    assert text == "hola ñ 🦊"
    assert done.reason == "stop"
    assert done.usage["prompt_tokens"] == len("hola ñ 🦊".encode()) + 1
    assert done.usage["completion_tokens"] == len("hola ñ 🦊".encode())


def test_a_killed_client_disturbs_nobody_and_leaves_no_slot(box: Box) -> None:
    box.daemon(0.01, ROOMY)
    code = (
        "import asyncio, json, os, sys\n"
        "from serve.client import connect\nfrom serve.runtime import Record\n"
        "async def talk():\n"
        "    client = await connect(Record(**json.loads(sys.argv[1])))\n"
        f"    async for piece in client.ask([{{'role': 'user', 'content': '{ENDLESS}'}}]):\n"
        "        print(getattr(piece, 'text', ''), flush=True)\n"
        "asyncio.run(talk())\n"
    )
    record = (box.runtime / "echo.json").read_text()
    victim = subprocess.Popen(
        [sys.executable, "-c", code, record], cwd=ROOT, stdout=subprocess.PIPE, env=box.environment()
    )
    with RawClient(box.record()) as other:
        request = other.submit(LONG)
        assert victim.stdout is not None and victim.stdout.readline()
        wait_until(lambda: other.status()["busy_slots"] == 2)
        victim.kill()
        victim.wait()
        victim.stdout.close()
        deltas, last = other.collect(request)
        assert text_of(deltas) == LONG
        assert last.kind is Kind.DONE
        wait_until(lambda: is_idle(other))


def test_a_silent_client_loses_its_slot(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "SILENCE_SECONDS", 1.0)

    def talk() -> None:
        with RawClient(box.record()) as silent, RawClient(box.record()) as watcher:
            silent.submit(ENDLESS)
            wait_until(lambda: watcher.status()["busy_slots"] == 1)
            wait_until(lambda: is_idle(watcher))

    beside_a_daemon(box, monkeypatch, talk, ROOMY, delay=0.02)


def test_cancel_ends_with_one_error_and_frees_the_slot(box: Box) -> None:
    box.daemon(0.01, ROOMY)
    with RawClient(box.record()) as client, RawClient(box.record()) as stranger:
        request = client.submit(ENDLESS)
        client.receive("data")
        stranger.cancel(request)
        while client.receive("data").kind is not Kind.DELTA:
            pass
        client.cancel(request)
        client.cancel(request)
        _, last = client.collect(request)
        assert (last.kind, last.body["code"]) == (Kind.ERROR, "E_CANCELLED")
        wait_until(lambda: is_idle(client))
        assert client.is_quiet()


def test_a_slow_reader_without_credit_loses_nothing(box: Box) -> None:
    box.daemon()
    text = "".join(chr(97 + i % 26) for i in range(900))
    with RawClient(box.record()) as client:
        deltas, last = client.collect(client.submit(text))
        assert text_of(deltas) == text
        assert len(deltas) == CREDIT_WINDOW + 1
        assert last.kind is Kind.DONE
        assert client.is_quiet()


def test_credit_is_refilled_by_the_client(box: Box) -> None:
    box.daemon(0.001)

    async def talk() -> list[Delta]:
        with await connect(box.record()) as client:
            pieces = client.ask([{"role": "user", "content": "x" * 900}])
            return [piece async for piece in pieces if isinstance(piece, Delta)]

    deltas = asyncio.run(talk())
    assert "".join(d.text for d in deltas) == "x" * 900
    assert len(deltas) > CREDIT_WINDOW + 100


def test_bad_requests_end_only_themselves(box: Box) -> None:
    box.daemon(0.005)
    with RawClient(box.record()) as good, RawClient(box.record()) as bad:
        request = good.submit(LONG)
        for options in ({"temperature": float("nan")}, {"top_k": -1}, {"max_tokens": 0}, {"session": b"guess"}):
            _, last = bad.collect(bad.submit("x", **options))
            assert last.body["code"] == "E_BAD_REQUEST"
        for length, counts in (
            (2047, {"have": 2048, "need": 2049, "max": 2048}),
            (2**22, {"num_characters": 2**22, "max": 2048}),
        ):
            _, last = bad.collect(bad.submit("x" * length))
            assert (last.body["code"], last.body["detail"]) == ("E_CONTEXT", counts)
        turns = [{"role": "user", "content": "x" * 2**20}]
        assert bad.ask(Kind.TOKENIZE, messages=turns).body["detail"] == {"num_characters": 2**20, "max": 2048}
        refused = os.urandom(16)
        turns = [{"role": "assistant", "content": "x"}]
        bad.send("data", Message(Kind.SUBMIT, refused, {"messages": turns, "session": bad.session}))
        assert bad.collect(refused)[1].body["code"] == "E_BAD_REQUEST"
        for frames in ([b"x"], [MAGIC, b"~", bytes(16), b"\x80"], [os.urandom(9)] * 4, [b""] * 9):
            bad.sockets["data"].send_multipart(frames)
            assert bad.receive("data").kind is Kind.ERROR
        bad.send("control", Message(Kind.SUBMIT, os.urandom(16), {"messages": []}))
        assert bad.receive("control").body["code"] == "E_UNSUPPORTED"
        bad.sockets["data"].send_multipart([bytes(9 * 2**20)])
        deltas, last = good.collect(request)
        assert text_of(deltas) == LONG
        assert good.is_quiet()


def test_max_tokens_and_the_context_end_an_answer(box: Box) -> None:
    box.daemon()
    with RawClient(box.record()) as client:
        deltas, last = client.collect(client.submit("abcdef", max_tokens=3))
        assert (text_of(deltas), last.body["reason"]) == ("abc", "length")
        _, last = client.collect(client.submit("x" * 2000))
        assert last.body["reason"] == "length"
        assert last.body["usage"]["prompt_tokens"] + last.body["usage"]["completion_tokens"] == 2048


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_requests_and_removes_everything(box: Box, number: signal.Signals) -> None:
    daemon = box.daemon(0.02)
    (engine,) = children(daemon.pid)
    assert box.left() == {"echo.json", "echo.data", "echo.control", "echo.engine0"}
    with RawClient(box.record()) as client:
        request = client.submit("x" * 900)
        client.receive("data")

        def send() -> None:
            # The whole group, as Ctrl-C in a terminal does.
            os.killpg(daemon.pid, number) if number is signal.SIGINT else daemon.send_signal(number)

        send()
        wait_until(lambda: client.status()["state"] == "draining")
        send()
        _, last = client.collect(request)
        assert last.body["code"] == "E_DRAINING"
        assert client.is_quiet(0.1)
    assert daemon.wait(PATIENCE) == 0
    assert daemon.stderr is not None and daemon.stderr.read() == ""
    assert box.left() == set()
    assert runtime.start_time(engine) is None


def test_a_killed_daemon_takes_its_engine_along_and_can_be_replaced(box: Box) -> None:
    daemon = box.daemon(0.02)
    (engine,) = children(daemon.pid)

    async def talk() -> None:
        with await connect(box.record()) as client, pytest.raises(NoDaemonError, match="gone"):
            async for _ in client.ask([{"role": "user", "content": "x" * 900}]):
                daemon.kill()

    asyncio.run(talk())
    daemon.wait()
    wait_until(lambda: runtime.start_time(engine) is None)
    assert runtime.find(box.runtime, "echo") is None
    assert box.left() == set()
    box.daemon()
    assert box.run("chat", stdin="again").stdout == "again\n"


def test_an_engine_that_dies_again_and_again_ends_the_daemon(box: Box) -> None:
    daemon = box.daemon(0.02)
    with RawClient(box.record()) as client:
        for _ in range(3):
            request = client.submit("x" * 900)
            while client.receive("data").kind is not Kind.DELTA:
                pass
            os.kill(children(daemon.pid)[0], signal.SIGKILL)
            ending = client.collect(request)[1]
            assert (ending.body["code"], ending.body["retryable"]) == ("E_ENGINE", True)
    assert daemon.wait(PATIENCE) == 6
    assert daemon.stderr is not None
    (line,) = daemon.stderr.read().splitlines()
    assert line.startswith("error: the engine process died (SIGKILL)")
    assert box.left() == set()


def test_the_client_reports_a_cancel(box: Box) -> None:
    box.daemon(0.01)

    async def talk() -> None:
        with await connect(box.record()) as client:
            with pytest.raises(RequestError) as caught:
                async for _ in client.ask([{"role": "user", "content": "x" * 900}]):
                    client.cancel()
            assert caught.value.exit_code == 5
            # Before the first word: the daemon may not even know the request.
            answer = client.ask([{"role": "user", "content": "x" * 900}])
            waiting = asyncio.ensure_future(anext(answer))
            await asyncio.sleep(0)
            client.cancel()
            with pytest.raises(RequestError):
                await waiting
            assert (await client.status())["waiting"] == 0

    asyncio.run(talk())


def test_a_second_daemon_is_refused_and_names_the_first(box: Box) -> None:
    first = box.daemon()
    second = box.run("daemon", "HOLD=echo")
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert line.startswith("error: runs/echo is already served") and str(first.pid) in line
    assert box.run("chat", stdin="still here").stdout == "still here\n"


def test_the_runtime_directory_is_private(box: Box, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    box.daemon()
    assert box.runtime.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in box.runtime.iterdir())
    (box.runtime / "echo.json").chmod(0o644)
    with pytest.raises(UserError, match="not written by your daemon"):
        runtime.find(box.runtime, "echo")
    (box.runtime / "echo.json").chmod(0o600)
    monkeypatch.setenv("AFINAR_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o755)
    with pytest.raises(UserError, match="chmod 700"):
        runtime.directory()


def test_too_long_a_socket_path_is_one_line(box: Box) -> None:
    box.runtime = box.folder / ("d" * 120)
    done = box.run("daemon", "HOLD=echo")
    assert done.returncode == 2
    assert "107 bytes" in done.stderr and done.stderr.count("\n") == 1


def test_two_daemons_are_told_apart_by_name(box: Box) -> None:
    box.daemon(0.0, "RUN=runs/a")
    box.daemon(0.0, "RUN=runs/b")
    done = box.run("chat", stdin="x")
    assert done.returncode == 2 and "runs/a, runs/b" in done.stderr
    assert box.run("chat", "RUN=b", stdin="x").stdout == "x\n"
    assert {record.name for record in runtime.find_all(box.runtime)} == {"a", "b"}


def test_a_run_that_cannot_be_loaded_ends_the_daemon(box: Box) -> None:
    folder = box.work / "runs" / "broken"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"format": 1, "state": "finished", "command": "make train"}))
    (box.folder / "torch").mkdir()
    # A torch that cannot be imported: loading fails at once, without the seconds that the real one takes.
    (box.folder / "torch" / "__init__.py").write_text("raise ImportError('no torch here')")
    done = box.run("daemon", "RUN=broken", cold=True, PYTHONPATH=f"{box.folder}:{ROOT}")
    assert done.returncode == 6
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no torch here")
    assert box.left() == set()


def test_welcome_says_what_it_serves(box: Box) -> None:
    box.daemon()
    client = RawClient(box.record())
    client.send("control", Message(Kind.PING))
    assert client.receive("control").body["code"] == "E_BAD_REQUEST"
    client.send("control", Message(Kind.HELLO, body={"proto": [7]}))
    assert client.receive("control").body["code"] == "E_UNSUPPORTED"
    client.send("control", Message(Kind.HELLO, body={"proto": [1, 2]}))
    welcome = decode(client.sockets["control"].recv_multipart())
    assert welcome.body["epoch"] == box.record().epoch
    assert welcome.body["info"]["context"] == 2048
    assert welcome.body["limits"]["queue"] == 64
    client.__exit__()
