"""The terminal client in a real pseudo-terminal, seen by a terminal emulator."""

import json
import os
import random
import re
import signal
import sys
import termios
import time
from pathlib import Path

import pytest

from serve import runtime
from serve.chat.conversation_events import Answer, User
from serve.chat.conversation_file import ConversationFile
from serve.errors import EXIT_CANCELLED
from tests.serve_fixtures import Box, Screen, box, wait_until

__all__ = ["box"]
LEAVE = "\x04"
INTERRUPT = "\x03"
UP = "\x1b[A"
LONG = "abcdefghijklmnopqrstuvwxyz" * 5
SAMPLES = Path(__file__).parent / "samples"


def conversations(box: Box) -> list[Path]:
    return sorted((box.folder / ".local/state/afinar/conversations").glob("*.jsonl"))


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_conversation(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        assert screen.said == [
            "runs/echo: echo (echo, none), 2048 tokens. /help shows the commands, Ctrl-D leaves.",
        ]
        assert screen.ask("hola ñ", "hola ñ") == ["> hola ñ", "hola ñ"]
        screen.expect("15/2048 tokens")
        assert screen.ask("/status", "slots")[-1].startswith("0 of 8 slots busy, 0 waiting; 1 exchange in this")
        screen.type(INTERRUPT)
        screen.expect("Ctrl-D or /quit leaves.\n>")
        screen.type("/quit\r")
        assert screen.wait() == 0
    (path,) = conversations(box)
    assert [event["kind"] for event in events(path)] == ["conversation", "begin", "user", "answer"]


def test_ctrl_c_stops_the_answer_and_keeps_what_came(box: Box) -> None:
    box.daemon(0.03)
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(LONG + "\r")
        screen.expect("\nabcdef")
        screen.expect("answering")
        screen.type(INTERRUPT)
        screen.expect(" [interrupted]\n>")
        assert screen.ask("next", "next")[-1] == "next"
        assert "0 of 8 slots busy, 0 waiting; 2 exchanges" in screen.ask("/status", "slots")[-1]
        screen.type(LEAVE)
        assert screen.wait() == 0


def test_ctrl_c_empties_a_prompt_before_anything_else(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type("half a question")
        screen.expect("> half a question")
        screen.type(INTERRUPT)
        wait_until(lambda: screen.read(0.05) and "half" not in screen.text)
        screen.type(INTERRUPT)
        screen.expect("Ctrl-D or /quit leaves.\n>")


@pytest.mark.slow
def test_fifty_cancels_leave_nothing_behind(box: Box) -> None:
    box.daemon(0.01, "serve.context=100000")
    chosen = random.Random(0)
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        for number in range(50):
            screen.type(f"{number:02d}{LONG}\r")
            # From before it is accepted until deep in the answer.
            end = time.monotonic() + chosen.random() * 0.8
            while time.monotonic() < end:
                screen.read(0.01)
            screen.type(INTERRUPT)
            wait_until(lambda: screen.read(0.01) and "answering" not in screen.text and "reading" not in screen.text)
        assert "0 of 8 slots busy, 0 waiting" in screen.ask("/status", "slots")[-1]
        screen.type(LEAVE)
        assert screen.wait() == 0
    (path,) = conversations(box)
    kinds = [event["kind"] for event in events(path) if event["kind"] in ("user", "answer", "withdraw")]
    assert all(one == "user" and other != "user" for one, other in zip(kinds[::2], kinds[1::2], strict=True))


def test_ctrl_c_is_not_for_make(box: Box) -> None:
    box.daemon(0.03)
    (box.work / "Makefile").write_text(f"chat:\n\t@{sys.executable} -m serve chat\n")
    with Screen(box, through=("make", "chat")) as screen:
        screen.expect("\n>")
        screen.type(LONG + "\r")
        screen.expect("\nabc")
        screen.type(INTERRUPT)
        screen.expect("[interrupted]\n")
        screen.type(LEAVE)
        assert screen.wait() == 0
        assert "Interrupt" not in screen.text


def test_an_impatient_user_breaks_nothing(box: Box) -> None:
    box.daemon(0.03)
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(LONG + "\r")
        screen.expect("\nabc")
        for _ in range(20):
            os.kill(screen.process.pid, signal.SIGINT)
            time.sleep(0.005)
        screen.expect(" [interrupted]\n")
        screen.type("one\rtwo\r")
        screen.expect("\ntwo\n>")
        # Right after an answer, while the next one runs.
        screen.type(LONG + "\r" + LEAVE)
        assert screen.wait() == 0


def test_lines_typed_during_an_answer_wait_for_its_end(box: Box) -> None:
    box.daemon(0.02)
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(LONG + "\r")
        screen.expect("answering")
        screen.type("after it\r")
        screen.expect("1 line waits")
        screen.type("/status\r/help\r")
        # What needs no daemon does not wait.
        screen.expect("Ctrl-X Ctrl-E")
        assert LONG[-20:] not in screen.text.split("/help\n")[-1]
        screen.expect("\nafter it\n0 of 8 slots busy")
        screen.type("/quit\r")
        assert screen.wait() == 0


def test_quit_during_an_answer_keeps_what_came(box: Box) -> None:
    box.daemon(0.03)
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(LONG + "\r")
        screen.expect("\nabcd")
        screen.type("/quit\r")
        assert screen.wait() == 0
    (path,) = conversations(box)
    answer = events(path)[-1]
    assert answer["is_interrupted"] and LONG.startswith(answer["text"]) and len(answer["text"]) >= 4


def test_prompts_are_remembered_over_a_restart(box: Box) -> None:
    box.daemon()
    for keys in ("remember me\r", UP):
        with Screen(box, "chat") as screen:
            screen.expect("\n>")
            screen.type(keys)
            screen.expect("> remember me")
            if keys != UP:
                screen.expect("\nremember me\n>")
            else:
                screen.type("\r")
                screen.expect("\nremember me\n>")
            screen.type(LEAVE)
            assert screen.wait() == 0
    history = box.folder / ".local" / "state" / "afinar" / "history"
    assert history.stat().st_mode & 0o777 == 0o600


def test_several_lines_are_one_message(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type("\x1b[200~one\r\ntwo\r\x1b[201~")
        screen.expect("two")
        screen.type("\x1b\rthree\r")
        screen.expect("\none\ntwo\n\nthree\n>")
        assert screen.said[-7:] == ["> one", "  two", "", "  three", "one", "two", "", "three"][-7:]


def test_the_editor_of_the_user_writes_the_question(box: Box) -> None:
    box.daemon()
    editor = box.folder / "editor"
    editor.write_text("#!/bin/sh\necho from the editor > $1\n")
    editor.chmod(0o755)
    with Screen(box, "chat", EDITOR=str(editor)) as screen:
        screen.expect("\n>")
        screen.type("\x18\x05")
        screen.expect("> from the editor")
        screen.type("\r")
        screen.expect("\nfrom the editor\n>")


def test_a_conversation_outlives_its_daemon_and_asks_nothing_twice(box: Box) -> None:
    daemon = box.daemon(0.03)
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(LONG + "\r")
        screen.expect("\nabc")
        daemon.kill()
        daemon.wait()
        screen.expect("Looking for a daemon")
        box.daemon()
        screen.expect("Connected again. Enter asks again.\n> /regenerate")
        assert box.events()[-1]["event"] != "submit"
        screen.type("\r")
        screen.expect(f"\n{LONG[:99]}\n{LONG[99:]}\n>")
        assert "1 exchange in" in screen.ask("/status", "slots")[-1]
        screen.type(LEAVE)
        assert screen.wait() == 0


def test_looking_for_a_daemon_can_be_stopped_and_the_question_stays(box: Box) -> None:
    daemon = box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        daemon.kill()
        daemon.wait()
        screen.type("anybody?\r")
        screen.expect("Looking for a daemon")
        screen.type(INTERRUPT)
        screen.expect("> anybody?\n echo@base")
        box.daemon()
        screen.type("\r")
        screen.expect("Connected: runs/echo")
        screen.expect("\nanybody?\n>")


def test_what_does_not_fit_is_the_users_choice(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.ask("/system S", "system: S")
        for letter in "abc":
            screen.type(letter * 300 + "\r")
            screen.settle()
        assert screen.ask("d" * 300, "do not ask")[-4:] == [
            "2101 characters, and 2048 tokens are there: this question does not fit with all before it.",
            "  d      leave out the oldest exchange",
            "  s      and put your own summary there",
            "  Enter  do not ask",
        ]
        # Neither answer nor Ctrl-C: the question is not asked.
        screen.type(INTERRUPT)
        screen.settle()
        screen.type("\r")
        screen.settle()
        screen.ask("", "Not asked.")
        # The question stands at the prompt again.
        screen.settle()
        screen.type("\r")
        screen.settle()
        screen.ask("s", "on one line:")
        screen.ask("it was about a", "1 exchange is no longer sent; the system text stays.")
        screen.settle()
        screen.type(LEAVE)
        assert screen.wait() == 0
    (path,) = conversations(box)
    kinds = [event["kind"] for event in events(path)]
    assert kinds[-3:] == ["drop", "summary", "answer"] and "withdraw" in kinds


def test_model_output_cannot_reach_the_terminal(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        # Ctrl-Q takes the next key as it is.
        screen.type("a\x11\x1b]0;title\r")
        screen.expect("\na\\x1b]0;title\n")
        assert b"\x1b]0;" not in screen.raw


def test_infer_is_gone_with_its_client(box: Box) -> None:
    with Screen(box, "infer", "HOLD=echo", AFINAR_ECHO_DELAY="0.03") as screen:
        screen.expect("\n>")
        record = box.record()
        screen.type(LONG + "\r")
        screen.expect("\nabc")
        screen.type(INTERRUPT)
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


def test_chat_starts_another_daemon_when_the_one_it_started_dies(box: Box) -> None:
    with Screen(box, "chat", "START=yes", "HOLD=echo", AFINAR_ECHO_DELAY="0.03") as screen:
        screen.expect("\n>")
        screen.type(LONG + "\r")
        screen.expect("\nabc")
        os.kill(box.record().pid, signal.SIGKILL)
        screen.expect("Connected again. Enter asks again.\n> /regenerate")


def test_the_prompt_comes_without_torch(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        assert "libtorch" not in Path(f"/proc/{screen.process.pid}/maps").read_text()


def kill_during_an_answer(box: Box, *lines: str) -> None:
    """The last of the lines is being answered when the client is killed."""
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        for line in lines[:-1]:
            screen.type(f"{line}\r")
            screen.settle()
        screen.type(f"{lines[-1]}\r")
        screen.expect("answering")
        wait_until(lambda: events(conversations(box)[-1])[-1]["kind"] in ("user", "edit", "regenerate"))
        screen.process.kill()
        screen.wait()


@pytest.mark.parametrize("command", ["resume", "load"])
def test_a_question_whose_client_was_killed_stands_at_the_prompt(box: Box, command: str) -> None:
    box.daemon(0.03)
    kill_during_an_answer(box, LONG)
    name = conversations(box)[0].stem
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(f"/{command} {name}\r")
        screen.expect("This question was not answered; Enter asks it:")
        screen.expect("> abcdef")
        screen.type("\r")
        screen.expect("answering")
        screen.expect("xyz\n>")
        assert screen.ask("next", "next")[-1].startswith("n")
        screen.expect("\nnext\n>")
        screen.type(LEAVE)
        assert screen.wait() == 0
    kinds = [event["kind"] for event in events(max(conversations(box), key=os.path.getmtime))]
    assert [kind for kind in kinds if kind != "begin"] == [
        "conversation", "user", "withdraw", "user", "answer", "user", "answer",
    ]  # fmt: skip


def test_an_edit_whose_client_was_killed_is_offered_as_one(box: Box) -> None:
    box.daemon(0.03)
    kill_during_an_answer(box, "short", f"/edit {LONG}")
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(f"/resume {conversations(box)[0].stem}\r")
        screen.expect("1 exchange. The last question: short")
        screen.expect("> /edit abcdef")


def test_an_edit_without_a_word_is_offered_again(box: Box) -> None:
    daemon = box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.ask("one", "one")
        screen.settle()
        daemon.kill()
        daemon.wait()
        screen.type("/edit two\r")
        screen.expect("Looking for a daemon")
        screen.type(INTERRUPT)
        screen.expect("> /edit two\n\n")
        box.daemon()
        screen.type("\r")
        screen.expect("\ntwo\n>")
        assert "1 exchange in" in screen.ask("/status", "slots")[-1]


def test_to_load_a_conversation_takes_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ConversationFile(tmp_path)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert file.append(*[event for n in range(50) for event in (User(str(n)), Answer(str(n)))]) == ""
    # The file, and the folder that is its.
    assert len(synced) == 2 and len(events(file.path)) == 101
    file.close()


def test_ctrl_c_leaves_a_search(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.ask("hello", "hello")
        screen.type("\x12hel")
        screen.expect("hel")
        screen.settle()
        screen.type(INTERRUPT)
        screen.settle()
        assert screen.ask("there", "there")[-1] == "there"


@pytest.mark.parametrize("leave", ["/quit\r", LEAVE])
def test_lines_that_wait_when_the_user_leaves_are_not_asked(box: Box, leave: str) -> None:
    box.daemon(0.02)
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(LONG + "\r")
        screen.expect("answering")
        screen.type("one\rtwo\r")
        screen.expect("2 lines wait")
        screen.type(leave)
        assert screen.wait() == 0
        assert "2 lines that waited were left undone." in screen.text
    questions = [event["text"] for event in events(conversations(box)[0]) if event["kind"] == "user"]
    assert questions == [LONG]


def test_a_signal_that_ends_the_client_keeps_the_answer_and_the_terminal(box: Box) -> None:
    box.daemon(0.03)
    with Screen(box, "chat") as screen:
        before = termios.tcgetattr(screen.master)
        screen.expect("\n>")
        screen.type(LONG + "\r")
        screen.expect("\nabcd")
        screen.process.terminate()
        assert screen.wait() == EXIT_CANCELLED
        assert termios.tcgetattr(screen.master) == before
    answer = events(conversations(box)[0])[-1]
    assert answer["is_interrupted"] and answer["text"].startswith("abcd")


def test_a_key_that_is_held_down_is_answered_once(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type(INTERRUPT * 5)
        screen.settle()
        assert screen.text.count("Ctrl-D or /quit leaves.") == 1
        screen.ask("hello", "hello")
        screen.type(INTERRUPT)
        screen.settle()
        assert screen.text.count("Ctrl-D or /quit leaves.") == 2


def test_a_history_that_cannot_be_kept_is_no_matter(box: Box) -> None:
    (box.folder / ".local/state/afinar/history").mkdir(parents=True)
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        assert screen.ask("hello", "hello") == ["> hello", "hello"]
        screen.type(UP)
        screen.expect("> hello\n echo")


def test_a_long_question_leaves_half_of_the_screen(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        screen.expect("\n>")
        screen.type("\x1b[200~" + "\r".join(f"line {n}" for n in range(500)) + "\x1b[201~")
        screen.expect("line 499")
        screen.settle()
        assert screen.emulator.display[0].startswith("runs/echo")
        screen.type("\r")
        # What is wrong can be read above the question, which stands at the prompt again.
        screen.expect("Even alone this question does not fit")
        screen.settle()
        assert any("Even alone" in row for row in screen.emulator.display)
        assert "line 499" in screen.emulator.display[-2]


@pytest.mark.parametrize("lines", [5, 7])
def test_a_low_window_shows_what_fits_and_leaves_nothing_behind(box: Box, lines: int) -> None:
    box.daemon(0.01)
    with Screen(box, "chat", size=(40, lines)) as screen:
        screen.expect("\n>")
        table = [f"| {n} | x |" for n in range(12)]
        table[1] = "|---|---|"
        screen.type("\x1b[200~" + "\r".join([*table, "", "end"]) + "\x1b[201~\r")
        screen.type("typed\x1b\rahead\x1b\rof it")
        screen.expect("\nend\n", 12)
        screen.type(INTERRUPT)
        screen.expect("\nend\n>")
        rows = screen.said[screen.said.index("  end") + 1 :]
        assert rows == ["0  │ x", "───┼──", *[f"{n:<2} │ x" for n in range(2, 12)], "", "end"]
        screen.type("/")
        screen.expect("/help")
        assert "Window too small" not in screen.text


def choose(screen: Screen) -> None:
    screen.expect("\n>")
    for letter in "abc":
        screen.type(letter * 300 + "\r")
        screen.settle()
    screen.type("d" * 1500 + "\r")
    screen.expect("do not ask")


def test_a_choice_is_no_answer_to_help_and_quit(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat") as screen:
        choose(screen)
        screen.type("/help\r")
        screen.expect("Ctrl-X Ctrl-E")
        assert "Not asked." not in screen.text
        screen.type("/quit\r")
        assert screen.wait() == 0
    assert events(conversations(box)[0])[-1]["kind"] == "withdraw"


def test_the_count_is_of_all_that_is_sent(box: Box) -> None:
    box.daemon()
    (box.work / "notes").write_text("x" * 100)
    with Screen(box, "chat", "--system", "abc") as screen:
        # A turn is one token more than its bytes.
        screen.expect(" 5/2048 tokens")
        screen.ask("hello", "hello")
        screen.ask("/reset", "forgotten")
        screen.expect(" 5/2048 tokens")
        screen.ask("/file notes", "in front of")
        screen.expect(" 118/2048 tokens")
        (box.work / "notes").write_text("x" * 3000)
        screen.ask("/file notes", "in front of")
        screen.expect(" >2048/2048 tokens")
        # It does not fit: the files wait for another question.
        screen.type("what?\r")
        screen.expect("Even alone this question does not fit")
        screen.expect("> what?")
        screen.expect("2 files attached")


@pytest.mark.parametrize("variable", ["TERM=dumb", "NO_COLOR=1"])
def test_ctrl_c_is_not_for_make_on_a_plain_terminal(box: Box, variable: str) -> None:
    box.daemon(0.03)
    (box.work / "Makefile").write_text(f"chat:\n\t@{sys.executable} -m serve chat\n")
    name, _, value = variable.partition("=")
    with Screen(box, through=("make", "chat"), **{name: value}) as screen:
        screen.expect("\n>")
        screen.type(LONG + "\r")
        screen.expect("\nabc")
        screen.type(INTERRUPT)
        screen.expect("[interrupted]\n>")
        screen.type(INTERRUPT)
        screen.expect("Ctrl-D or /quit leaves.\n>")
        screen.type("/help\r")
        screen.expect("keep what came of it\n>")
        assert "Alt-Enter" not in screen.text
        screen.type(LEAVE)
        assert screen.wait() == 0
        assert "Interrupt" not in screen.text and b"\x1b" not in screen.raw


def test_a_plain_terminal_offers_a_question_once(box: Box) -> None:
    daemon = box.daemon(1.0)
    with Screen(box, "chat", NO_COLOR="1") as screen:
        screen.expect("\n>")
        screen.type("again\r")
        wait_until(lambda: conversations(box) and events(conversations(box)[0])[-1]["kind"] == "user")
        daemon.kill()
        daemon.wait()
        screen.expect("Looking for a daemon")
        box.daemon()
        screen.expect("Connected again. Enter asks again.\n>")
        assert screen.text.count("[Enter] again") == 1
        screen.type("\r")
        screen.expect("\nagain\n>")


def test_a_plain_terminal_copies_nothing(box: Box) -> None:
    box.daemon()
    with Screen(box, "chat", NO_COLOR="1", DISPLAY="", WAYLAND_DISPLAY="") as screen:
        screen.expect("\n>")
        screen.type("hello\r")
        screen.expect("\nhello\n>")
        screen.type("/copy\r")
        screen.expect("error: no program here can copy, and this terminal gets no escapes; try /export talk.md\n>")
        assert b"\x1b" not in screen.raw


@pytest.mark.slow
def test_every_line_of_a_long_answer_is_there_once_and_a_token_costs_the_same(box: Box) -> None:
    (box.work / "long").mkdir()
    lines = [f"- L{n:04d} **b** `c` 漢字 🙂" if n % 3 else f"| L{n:04d} | x |" for n in range(2000)]
    (box.work / "long" / "prefix").write_text("\n".join(lines) + "\n")
    box.daemon(0.0, "serve.context=200000")
    assert box.run("load", "ADAPTER=long").returncode == 0
    with Screen(box, "chat", "ADAPTER=long", size=(80, 24)) as screen:
        screen.expect("\n>")
        screen.type("go\r")
        screen.expect("L0300", 60)
        screen.resize(100, 30)
        screen.expect("\ngo\n>", 120)
        seen = re.findall(r"L\d{4}", "\n".join(screen.said))
        assert seen == [f"L{n:04d}" for n in range(2000)]
