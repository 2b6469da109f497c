"""The terminal client in a real pseudo-terminal, and the same program in a pipe."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from serve import runtime
from tests.serve_fixtures import Box, Screen, box, children, wait_until

__all__ = ["box"]
LEAVE = "\x04"
INTERRUPT = "\x03"
UP = "\x1b[A"


def test_a_conversation(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        assert "runs/echo: echo (echo, none), context 2048 tokens" in screen.expect("\n>")
        screen.type("hola ñ\r")
        screen.expect("\nhola ñ\n7 tokens, ")
        screen.type("/hepl\r")
        screen.expect("did you mean /help?")
        screen.type("/help\r")
        screen.expect("/reset")
        screen.type("/status\r")
        assert "0 of 8 slots busy" in screen.expect("conversation\n>")
        screen.type(INTERRUPT)
        screen.expect("Ctrl-D or /quit leaves.")
        screen.type("/quit\r")
        assert screen.wait() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_prompt(box: Box) -> None:
    box.daemon(0.03)
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type("abcdefghijklmnopqrstuvwxyz" * 5 + "\r")
        screen.expect("\nabcdef")
        pressed = time.monotonic()
        os.write(screen.master, INTERRUPT.encode())
        screen.expect(" [interrupted]\n")
        assert time.monotonic() - pressed < 1.0
        screen.type("next\r")
        screen.expect("\nnext\n4 tokens")
        screen.type("/status\r")
        screen.expect("0 of 8 slots busy, 0 waiting, 4 turns")
        screen.type(LEAVE)
        assert screen.wait() == 0


def test_ctrl_c_is_not_for_make(box: Box) -> None:
    box.daemon(0.03)
    (box.work / "Makefile").write_text(f"chat:\n\t@{sys.executable} -m serve chat\n")
    with Screen(box, through=("make", "chat")) as screen:
        screen.expect("\n>")
        screen.type("abcdefghijklmnopqrstuvwxyz" * 5 + "\r")
        screen.expect("\nabc")
        os.write(screen.master, INTERRUPT.encode())
        screen.expect("[interrupted]\n")
        screen.type(LEAVE)
        assert screen.wait() == 0
        assert "Interrupt" not in screen.text


def test_an_impatient_user_breaks_nothing(box: Box) -> None:
    box.daemon(0.03)
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type("abcdefghijklmnopqrstuvwxyz" * 5 + "\r")
        screen.expect("\nabc")
        os.write(screen.master, b"typed ahead")
        for _ in range(20):
            os.kill(screen.process.pid, signal.SIGINT)
            time.sleep(0.005)
        screen.expect(" [interrupted]\n")
        screen.type("\r")
        screen.expect("\ntyped ahead\n11 tokens")
        # Right after an answer, perhaps before the prompt is back.
        screen.type("x\r")
        os.write(screen.master, LEAVE.encode())
        assert screen.wait() == 0


def test_prompts_are_remembered_over_a_restart(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type("remember me\r")
        screen.expect("tokens/s")
        screen.type(LEAVE)
        assert screen.wait() == 0
    history = box.folder / ".local" / "state" / "afinar" / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(UP)
        screen.expect("remember me")
        screen.type("\r")
        screen.expect("11 tokens")
        screen.type(LEAVE)
        assert screen.wait() == 0


def test_a_conversation_outlives_its_daemon(box: Box) -> None:
    daemon = box.daemon(0.03)
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type("abcdefghijklmnopqrstuvwxyz" * 5 + "\r")
        screen.expect("\nabc")
        daemon.kill()
        daemon.wait()
        screen.expect("is gone")
        screen.type("anybody?\r")
        screen.expect("no run is served")
        box.daemon()
        screen.type("and now?\r")
        screen.expect("\nand now?\n8 tokens")
        screen.type("/status\r")
        screen.expect("4 turns")
        screen.type(LEAVE)
        assert screen.wait() == 0


def test_model_output_cannot_reach_the_terminal(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        # Ctrl-Q takes the next key as it is.
        screen.type("a\x11\x1b]0;title\r")
        screen.expect("\na\\x1b]0;title\n")
        assert b"\x1b]0;" not in screen.raw
        screen.type(LEAVE)
        assert screen.wait() == 0


def test_a_pipe_gets_plain_text(box: Box) -> None:
    box.daemon()
    done = box.run("chat", stdin="first line\nsecond \x1b[31mred\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "first line\nsecond \\x1b[31mred\n"


def test_exit_codes_of_a_pipe(box: Box) -> None:
    done = box.run("chat", stdin="hi")
    assert done.returncode == 3
    assert done.stderr.startswith("error: no run is served; try: make serve") and done.stderr.count("\n") == 1
    done = box.run("chat", "RUN=nothing", stdin="hi")
    assert done.returncode == 2 and done.stderr.endswith("make train\n")
    box.daemon(0.02)
    assert box.run("chat", stdin=" \n").returncode == 2
    assert box.run("chat", "RNU=x", stdin="hi").returncode == 2
    done = box.run("chat", stdin="x" * 5000)
    assert done.returncode == 4 and "5001 tokens" in done.stderr
    client = box.start("chat")
    assert client.stdin is not None and client.stdout is not None and client.stderr is not None
    client.stdin.write("x" * 900)
    client.stdin.close()
    assert client.stdout.read(3) == "xxx"
    client.send_signal(signal.SIGINT)
    assert client.wait(5) == 5
    assert client.stderr.read() == "error: cancelled\n"


def test_a_dead_engine_is_exit_code_6(box: Box) -> None:
    daemon = box.daemon(0.02)
    client = box.start("chat")
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write("x" * 900)
    client.stdin.close()
    client.stdout.read(1)
    (engine,) = children(daemon.pid)
    os.kill(engine, signal.SIGKILL)
    assert client.wait(5) == 6


def test_a_reader_that_stops_early_is_no_crash(box: Box) -> None:
    box.daemon(0.005)
    words = f"echo {'x' * 300} | {sys.executable} -m serve chat | head -c 5"
    done = subprocess.run(
        words, shell=True, cwd=box.work, env=box.environment(), capture_output=True, text=True, timeout=20
    )
    assert (done.stdout, done.stderr) == ("xxxxx", "")


def test_chat_can_start_a_daemon_that_stays(box: Box) -> None:
    done = box.run("chat", "START=yes", "HOLD=echo", stdin="hi")
    assert (done.returncode, done.stdout) == (0, "hi\n")
    record = box.record()
    assert record.is_alive
    assert box.run("chat", "START=yes", stdin="ho").stdout == "ho\n"
    assert box.record() == record
    os.kill(record.pid, signal.SIGTERM)
    wait_until(lambda: box.left() == set())


def test_a_daemon_that_cannot_start_says_why(box: Box) -> None:
    box.runtime.mkdir(mode=0o700)
    lock = (box.runtime / "echo.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = box.run("chat", "START=yes", "HOLD=echo", stdin="hi")
    lock.close()
    assert done.returncode == 2 and "already served" in done.stderr


def test_infer_is_gone_with_its_client(box: Box) -> None:
    with Screen(box, "infer", "HOLD=echo", AFINAR_ECHO_DELAY="0.03") as screen:
        screen.expect("\n>")
        record = box.record()
        screen.type("abcdefghijklmnopqrstuvwxyz\r")
        screen.expect("\nabc")
        os.write(screen.master, INTERRUPT.encode())
        screen.expect("[interrupted]")
        assert record.is_alive
        screen.type(LEAVE)
        assert screen.wait() == 0
    assert box.left() == set()
    with Screen(box, "infer", "HOLD=echo") as screen:
        screen.expect("\n>")
        record = box.record()
        screen.process.kill()
        wait_until(lambda: runtime.start_time(record.pid) is None)
    assert box.left() == set()


def test_the_prompt_comes_quickly_and_without_torch(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(LEAVE)
        assert screen.wait() == 0
    begin = time.monotonic()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        # 0.5 s is the aim, met with room to spare on an idle machine; twice that on a busy one.
        assert time.monotonic() - begin < 1.0
        assert "libtorch" not in Path(f"/proc/{screen.process.pid}/maps").read_text()
