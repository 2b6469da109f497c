"""`chat` in a pipe: an exit code for every ending, a line on stderr, and with `--json` a last object that says the same."""

import array
import fcntl
import os
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

from serve.protocol import Code
from tests.pipes import FORMS, PYTHON, check_ending, in_shell, objects, pipe
from tests.serve_fixtures import PATIENCE, Box, box, children, wait_until

__all__ = ["box"]
LONG = "x" * 900


def ask_slowly(box: Box, *flags: str) -> subprocess.Popen[str]:
    """A client in the middle of an answer that takes long, but fits a buffer: what is not written at once comes too late."""
    client = box.start("chat", *flags, PYTHONUNBUFFERED="")
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write("x" * 90)
    client.stdin.close()
    # With --json the first line says only that it was accepted.
    assert "x" in (client.stdout.readline() + client.stdout.readline() if flags else client.stdout.read(3))
    return client


def ending(client: subprocess.Popen[str], flags: tuple[str, ...], code: int) -> dict[str, Any]:
    """How a client ended that failed: its line on stderr, and with --json its last object, which says the same."""
    assert client.stdout is not None and client.stderr is not None
    last, error = client.stdout.read().splitlines()[-1], client.stderr.read()
    assert client.wait(PATIENCE) == code
    return check_ending(last, error, flags, code)


@FORMS
def test_exit_code_0(box: Box, flags: tuple[str, ...]) -> None:
    box.daemon()
    done = box.run("chat", *flags, stdin="hi")
    assert (done.returncode, done.stderr) == (0, "")
    assert objects(done.stdout)[-1]["type"] == "done" if flags else done.stdout == "hi\n"


@FORMS
def test_exit_code_2_for_usage(box: Box, flags: tuple[str, ...]) -> None:
    # No daemon is there: what is wrong with the words comes first.
    for words in (("RNU=x",), ("--sytem", "x"), ("--set", "top_k=-1"), ("hello",)):
        done = box.run("chat", *words, *flags, stdin="hi")
        assert done.returncode == 2
        assert check_ending(done.stdout, done.stderr, flags, 2).get("code", "usage") == "usage"
    box.daemon()
    for data in (b" \n", b"caf\xe9", b"x" * (8 * 2**20 + 1)):
        piped = pipe(box, data, *flags)
        assert piped.returncode == 2
        check_ending(piped.stdout.decode(), piped.stderr.decode(), flags, 2)
    done = box.run("chat", "--adapter", "nobody", *flags, stdin="hi")
    assert done.returncode == 2
    assert check_ending(done.stdout, done.stderr, flags, 2).get("code", "E_NO_ADAPTER") == "E_NO_ADAPTER"


@FORMS
def test_what_is_wrong_is_told_in_the_users_language(box: Box, flags: tuple[str, ...]) -> None:
    box.daemon()
    for data, wanted in (
        (b"", "no llegó nada por stdin; prueba: echo hola | make -s chat"),
        (b"caf\xe9", "stdin no es UTF-8 (byte 3); prueba: iconv -t utf-8"),
        (b"x" * (8 * 2**20 + 1), "llegaron más de 8 MiB por stdin; prueba un texto más corto"),
    ):
        piped = pipe(box, data, *flags, AFINAR_LANG="es", PYTHONUTF8="1")
        assert check_ending(piped.stdout.decode(), piped.stderr.decode(), flags, 2)["message"] == wanted


@FORMS
def test_exit_code_3_without_a_daemon(box: Box, flags: tuple[str, ...]) -> None:
    done = box.run("chat", *flags, stdin="hi")
    assert done.returncode == 3
    found = check_ending(done.stdout, done.stderr, flags, 3)
    assert found["message"].startswith("no run is served; try: make serve")
    assert found.get("code", "no_daemon") == "no_daemon"
    daemon = box.daemon(0.2)
    client = ask_slowly(box, *flags)
    daemon.kill()
    daemon.wait()
    assert "is gone" in ending(client, flags, 3)["message"]


@FORMS
def test_exit_code_4_for_too_long_a_question(box: Box, flags: tuple[str, ...]) -> None:
    box.daemon()
    done = box.run("chat", *flags, stdin="x" * 3000)
    assert done.returncode == 4
    assert check_ending(done.stdout, done.stderr, flags, 4).get("code", Code.CONTEXT) == Code.CONTEXT
    assert done.stdout.count("\n") == len(flags)


@FORMS
def test_exit_code_5_after_ctrl_c(box: Box, flags: tuple[str, ...]) -> None:
    box.daemon(0.2)
    client = ask_slowly(box, *flags)
    client.send_signal(signal.SIGINT)
    assert client.stdout is not None
    assert ending(client, flags, 5) == {
        **({"type": "error", "code": "E_CANCELLED", "exit": 5} if flags else {}), "message": "cancelled"
    }  # fmt: skip


@FORMS
def test_exit_code_5_after_a_deadline(box: Box, flags: tuple[str, ...]) -> None:
    box.daemon(0.02)
    done = box.run("chat", "--set", "deadline_ms=1000", *flags, stdin=LONG)
    assert done.returncode == 5
    # What came before it is there, and ends with a newline.
    assert "x" in done.stdout and done.stdout.endswith("\n")
    found = check_ending(done.stdout.splitlines()[-1], done.stderr, flags, 5)
    assert found.get("code", "E_DEADLINE") == "E_DEADLINE" and "1000 ms" in found["message"]


@FORMS
def test_exit_code_6_after_the_engine_died(box: Box, flags: tuple[str, ...]) -> None:
    daemon = box.daemon(0.2)
    client = ask_slowly(box, *flags)
    (engine,) = children(daemon.pid)
    os.kill(engine, signal.SIGKILL)
    assert ending(client, flags, 6).get("code", "E_ENGINE") == "E_ENGINE"


@FORMS
def test_ctrl_c_while_stdin_is_read(box: Box, flags: tuple[str, ...]) -> None:
    box.daemon()
    client = subprocess.Popen(
        [sys.executable, "-m", "serve", "chat", *flags],
        cwd=box.work,
        env=box.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell has its background jobs ignore Ctrl-C, and they hand that on to all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    box.processes.append(client)
    assert client.stdout is not None
    # It waits for more of stdin: that is where it sleeps.
    wait_until(lambda: "pipe" in Path(f"/proc/{client.pid}/wchan").read_text())
    client.send_signal(signal.SIGINT)
    assert client.wait(PATIENCE) == 5
    assert [each["code"] for each in objects(client.stdout.read())] == (["E_CANCELLED"] if flags else [])


def test_a_second_ctrl_c_ends_a_client_that_nobody_reads(box: Box) -> None:
    box.daemon(0.001)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    client = subprocess.Popen(
        [sys.executable, "-m", "serve", "chat", "--json"],
        cwd=box.work,
        env=box.environment(),
        stdin=subprocess.PIPE,
        stdout=write,
    )
    box.processes.append(client)  # type: ignore[arg-type]
    os.close(write)
    assert client.stdin is not None
    client.stdin.write(LONG.encode())
    client.stdin.close()
    wait_until(lambda: is_full(read))
    assert is_caught(client.pid)
    client.send_signal(signal.SIGINT)
    wait_until(lambda: not is_caught(client.pid))
    assert client.poll() is None
    client.send_signal(signal.SIGINT)
    assert client.wait(PATIENCE) == -signal.SIGINT
    os.close(read)


def is_full(read: int) -> bool:
    """Whether a pipe of a page holds so much that the next object does not fit."""
    size = array.array("i", [0])
    fcntl.ioctl(read, termios.FIONREAD, size)
    return size[0] > 4096 - 40


def is_caught(pid: int) -> bool:
    """Whether a process does something of its own at Ctrl-C, as the kernel knows it."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (signal.SIGINT - 1) & 1)


@FORMS
def test_a_reader_that_leaves_is_no_crash(box: Box, flags: tuple[str, ...]) -> None:
    box.daemon(0.005)
    words = f"{PYTHON} chat {' '.join(flags)} | head -c 5; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", words],
        cwd=box.work,
        env=box.environment(),
        input=LONG,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.stderr) == (f"{'{' + chr(34) + 'typ' if flags else 'xxxxx'}5\n", "")


@FORMS
def test_what_cannot_be_written_is_one_line(box: Box, flags: tuple[str, ...]) -> None:
    box.daemon()
    full = "the answer cannot be written: No space left on device; try another file or disk"
    for end, code, why in (
        ("> /dev/full", 1, full),
        ("<&-", 2, "nothing came on stdin; try: echo hello | make -s chat"),
        (">&-", 2, "stdout is closed, nobody would see the answer; try: ... > answer.txt"),
    ):
        done = in_shell(box, f"chat {' '.join(flags)} {end}")
        assert (done.returncode, done.stderr) == (code, f"error: {why}\n")


def test_nobody_needs_to_read_stderr(box: Box) -> None:
    assert in_shell(box, "chat 2>&-").returncode == 3
    box.daemon()
    done = in_shell(box, "chat 2>&-")
    assert (done.returncode, done.stdout) == (0, "hi\n")
