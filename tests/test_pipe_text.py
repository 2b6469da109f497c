"""`chat` in a pipe: what goes in is one question, what comes out is plain text or objects, and no control character."""

import pytest

from serve.chat import outputs
from serve.chat.files import read_file
from serve.pieces import Delta, Done
from tests.pipes import FORMS, PYTHON, check_ending, objects, pipe
from tests.serve_fixtures import Box, Screen, box

__all__ = ["box"]


def test_no_control_character_gets_through(box: Box) -> None:
    box.daemon()
    unsafe = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
    text = f"{unsafe}\x1b]0;title\x07\x1b[31mñ\r🦊"
    done = pipe(box, text.encode())
    assert (done.returncode, done.stderr) == (0, b"")
    assert {byte for byte in done.stdout if byte < 0x20 or byte == 0x7F} == {*b"\t\n"}
    shown = "".join(c if c in "\t\nñ🦊" or " " <= c < "\x7f" else f"\\x{ord(c):02x}" for c in text)
    assert done.stdout.decode() == f"{shown}\n"
    done = pipe(box, text.encode(), "--json")
    assert {byte for byte in done.stdout if not 0x20 <= byte < 0x7F} == {*b"\n"}
    assert objects(done.stdout.decode())[-1]["text"] == text


@FORMS
def test_no_control_character_gets_through_an_error(box: Box, flags: tuple[str, ...]) -> None:
    box.daemon()
    for words in (["--adapter", "\x1b[2J\r\n\x9b"], ["\x1b[2J\n=x"], ["--set", "seed=\x1b\n"], ["--file", "\x1b\n"]):
        done = pipe(box, b"hi", *words, *flags)
        assert done.returncode == 2
        assert not [byte for byte in done.stdout + done.stderr if byte < 0x20 and byte != 0x0A], words
        assert "\x9b" not in (done.stdout + done.stderr).decode()
        assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
        assert done.stdout.count(b"\n") == len(flags)


@pytest.mark.parametrize("text", ["a\r\nb", "\r\r\n\r", "a\n", "", "\n\r\n", "a\r"])
def test_a_line_end_of_two_characters_is_one_wherever_it_is_cut(text: str) -> None:
    for end in (lambda o: o.show(Done("stop", {}, {}, "")) + o.close(), lambda o: o.close()):
        whole = outputs.PlainText()
        shown = whole.show(Delta(text, 0)) + end(whole)
        parts = outputs.PlainText()
        assert "".join(parts.show(Delta(c, 0)) for c in text) + end(parts) == shown
        assert shown.count("\\x0d") == text.replace("\r\n", "").count("\r")
        assert "\r" not in shown and (shown.endswith("\n") or not text)
        # One newline ends it, not two.
        assert shown.count("\n") == text.count("\n") + (shown != "" and not text.endswith("\n"))


def test_utf8_comes_out_whatever_the_locale(box: Box) -> None:
    box.daemon()
    done = pipe(box, "ñ🦊".encode(), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stdout.decode()) == (0, "ñ🦊\n")


def test_a_piece_without_words_is_no_object() -> None:
    # A client that came back may get again what it has.
    lines = outputs.JsonLines()
    assert [lines.show(Delta(text, 1)) for text in ("", "a")] == ["", '{"type": "delta", "text": "a"}\n']


def test_the_objects_of_an_answer(box: Box) -> None:
    # That each is written at once, test_pipes sees: it interrupts an answer of which it has read the first.
    box.daemon()
    done = box.run("chat", "--json", "--set", "max_tokens=20", stdin="abcdefghijklmnopqrstuvwxyz")
    accepted, *deltas, last = objects(done.stdout)
    assert {each["type"] for each in deltas} == {"delta"}
    assert (accepted["type"], last["type"], last["reason"]) == ("accepted", "done", "length")
    assert "".join(each["text"] for each in deltas) == last["text"] == "abcdefghijklmnopqrst"
    assert (done.returncode, done.stderr) == (0, "")


def test_flags_reach_the_daemon(box: Box) -> None:
    for name in ("one", "two"):
        (box.work / name).mkdir()
        (box.work / name / "prefix").write_text(f"{name}: ")
    box.daemon(0.0, "RUNS=./one ./two")
    plain = objects(box.run("chat", "--json", stdin="hola").stdout)[0]
    sets = ["temperature=0.5", "top_k=3", "seed=7", "max_tokens=9", "stop=X", "stop=f"]
    words = ["--system", "abc", "--adapter=two", *(word for each in sets for word in ("--set", each))]
    done = box.run("chat", *words, "--json", stdin="abcdefgh")
    accepted, *_, last = objects(done.stdout)
    assert (accepted["adapter"].partition("@")[0], accepted["max_tokens"]) == ("two", 9)
    assert {name: accepted["sampling"][name] for name in ("temperature", "top_k", "seed")} == {
        **{"temperature": 0.5, "top_k": 3, "seed": 7}
    }
    # A token for each byte, and one for each turn.
    assert (plain["prompt_tokens"], accepted["prompt_tokens"]) == (5, 9 + 4)
    assert (last["reason"], last["text"]) == ("length", "two: abcd")
    assert box.run("chat", *words[:-4], stdin="abcdefgh").stdout == "two: abcd\n"
    assert box.run("chat", "ADAPTER=two", "--set=stop=c", stdin="abcdefgh").stdout == "two: ab\n"


def test_several_lines_are_one_question(box: Box) -> None:
    box.daemon()
    done = box.run("chat", "--json", stdin="\n one\n\ntwo\n\n")
    assert [each["type"] for each in objects(done.stdout)].count("done") == 1
    assert objects(done.stdout)[-1]["text"] == "\n one\n\ntwo"


def test_files_go_in_front_of_the_question(box: Box) -> None:
    box.daemon()
    (box.work / "a.md").write_text("```\nfenced\n```")
    (box.work / "b.txt").write_text("ñ\n")
    flags, paths = ["--file", "a.md", "--file=b.txt"], [box.work / "a.md", box.work / "b.txt"]
    first, second = (read_file(str(path)) for path in paths)
    assert first.startswith("````") and "a.md" in first.splitlines()[0]
    done = box.run("chat", *flags, stdin="And now?\n")
    assert (done.returncode, done.stdout) == (0, f"{first}\n\n{second}\n\nAnd now?\n")
    # Files alone are a question.
    assert box.run("chat", *flags, stdin=" \n").stdout == f"{first}\n\n{second}\n"


def test_with_a_file_nobody_needs_to_type(box: Box) -> None:
    box.daemon()
    (box.work / "a.txt").write_text("in a file")
    with Screen(box, through=("sh", "-c", f"{PYTHON} chat --file a.txt | cat")) as screen:
        screen.expect("in a file")
        assert screen.wait() == 0


@FORMS
def test_a_wrong_file_is_told_before_a_daemon_is_looked_for(box: Box, flags: tuple[str, ...]) -> None:
    (box.work / "latin.txt").write_bytes(b"caf\xe9")
    (box.work / "large.txt").write_bytes(b"x" * (2**20 + 1))
    (box.work / "folder").mkdir()
    wrong = {
        "latin.txt": "not UTF-8",
        "large.txt": "larger than 1 MiB",
        "folder": "Is a directory",
        "none": "No such file",
    }
    for name, why in {**wrong, "/dev/zero": "larger than 1 MiB", "": "try"}.items():
        done = box.run("chat", "--file", name, *flags, stdin="hi")
        assert done.returncode == 2, name
        assert why in check_ending(done.stdout, done.stderr, flags, 2)["message"]
    (box.work / "large.txt").write_bytes(b"x" * 2**20)
    assert box.run("chat", "--file", "large.txt", stdin="hi").returncode == 3


def test_json_is_not_for_a_terminal(box: Box) -> None:
    with Screen(box, "chat", "--json") as screen:
        assert screen.wait() == 2
    assert b"error: --json is for pipes" in screen.raw
    assert screen.raw.endswith(b"try: echo hello | python -m serve chat --json\r\n")


def test_infer_answers_through_a_pipe(box: Box) -> None:
    done = box.run("infer", "HOLD=echo", "--json", "--set", "seed=1", stdin="hi")
    assert (done.returncode, done.stderr) == (0, "")
    accepted, *_, last = objects(done.stdout)
    assert (accepted["sampling"]["seed"], last["text"]) == (1, "hi")
    assert box.left() == set()
