"""Bad data: every fault at once, each one line with its place and what to try, never a traceback."""

import codecs
import gzip
import json
import os
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import pytest

from launcher import data, sources, textfile
from launcher.config import Data
from tests.data_files import WRITERS, assert_clear, assert_told, faults_of, jsonl, parquet, table, write
from tests.running import run_python

GOOD = {"text": "A good one."}
MIB = 2**20


def damaged(content, at, by=b"\xff\xff\xff\xff"):
    return content[:at] + by + content[at + len(by) :]


TEXTS = parquet([{"text": f"number {n}"} for n in range(50)])
LIST = json.dumps([GOOD, GOOD], indent=1)
# A file: its name, its bytes, and the faults that are told of it.
FILES = {
    "not JSON, twice": ("a.jsonl", b'{"text":"a"}\n{not json\n\n[1,\n', ["2: not JSON (", "4: not JSON ("]),
    "a pretty-printed object": ("a.jsonl", b'{\n"text": 1}\n', ["1: not JSON (expecting", "2: not JSON (extra data"]),
    "two objects on a line": ("a.jsonl", b'{"text":"a"} {"text":"b"}\n', ["1: not JSON (extra data, column 14)"]),
    "an unterminated string": ("a.jsonl", b'{"text":"a\n', ["1: not JSON (invalid control character"]),
    "old Mac line ends": ("a.jsonl", b'{"text":"a"}\r{"text":"b"}\r', ["1: not JSON (extra data"]),
    "a number of 5000 digits": ("a.jsonl", b'{"text":' + b"7" * 5000 + b"}\n", ["1: a number of too many digits"]),
    "deep nesting": ("a.jsonl", jsonl([GOOD]) + b"[" * 10**5 + b"\n" + b'{"a":' * 10**5, ["2: nested", "3: nested"]),
    "a byte order mark and a fault": ("a.jsonl", codecs.BOM_UTF8 + b'{"text": 7}\n', ['1: "text" is a number']),
    "CRLF and a fault": ("a.jsonl", b'{"text":"a"}\r\n\r\n{"text":""}\r\n', ['3: "text" is empty']),
    "Latin-1 lines": (
        "a.jsonl",
        b'{"text":"a"}\n{"text":"caf\xe9"}\n{"text":"\xe9"}\n',
        ["2: not UTF-8", "3: not UTF-8"],
    ),
    "a NUL byte in a late line": ("a.jsonl", jsonl([GOOD] * 99) + b'{"text":"\0"}\n', ["100: a NUL byte"]),
    "a NUL byte in an early line": ("a.jsonl", jsonl([GOOD]) + b'{"text":"\0"}\n', ["2: a NUL byte"]),
    "UTF-16": ("a.jsonl", '{"text":"a"}\n'.encode("utf-16"), ["1: UTF-16 text, not UTF-8; save it as UTF-8"]),
    "UTF-16, the other end first": ("a.jsonl", codecs.BOM_UTF16_BE + '{"text":"a"}'.encode("utf-16-be"), ["1: UTF-16"]),
    "UTF-16 without its mark": ("a.jsonl", '{"text":"a"}\n'.encode("utf-16-le"), ["1: a NUL byte"]),
    "UTF-32": ("a.jsonl", '{"text":"a"}\n'.encode("utf-32"), ["1: UTF-16 text"]),
    "binary junk": ("a.jsonl", bytes(range(256)) * 40, ["1: a NUL byte, so it is not UTF-8 text"]),
    "binary junk without NUL": ("a.jsonl", bytes(range(128, 256)) * 40, ["1: not UTF-8 text (byte 0x80)"]),
    "gzip named .jsonl": ("a.jsonl", gzip.compress(jsonl([GOOD])), ["1: compressed with gzip; unpack"]),
    "bzip2 named .csv": ("a.csv", b"BZh91AY&SY", ["1: compressed with bzip2"]),
    "xz named .json": ("a.json", b"\xfd7zXZ\0\0", ["1: compressed with xz"]),
    "zstd named .jsonl": ("a.jsonl", b"\x28\xb5\x2f\xfd\0", ["1: compressed with zstd"]),
    "a spreadsheet named .csv": ("a.csv", b"PK\x03\x04\x14\0", ["1: a zip archive or a spreadsheet"]),
    "parquet named .jsonl": ("a.jsonl", TEXTS, ["1: a parquet file; name it .parquet"]),
    "a PDF named .json": ("a.json", b"%PDF-1.7\n", ["1: a PDF file"]),
    "a list cut off": ("a.json", LIST[:-9].encode(), ["6: not JSON (unterminated string)"]),
    "a list not closed": ("a.json", LIST[:-2].encode(), ["7: not JSON (']' expected, the end of the file found)"]),
    "a list without a comma": ("a.json", LIST.replace("},", "}").encode(), ["5: not JSON (']' expected, '{' found)"]),
    "a list with a comma too many": ("a.json", LIST.replace("\n]", ",\n]").encode(), ["8: not JSON (expecting value)"]),
    "a list and more": ("a.json", LIST.encode() + b"\n[]", ["9: more text after the end"]),
    "a list in Latin-1": ("a.json", b'[\n{"text": "a"},\n{"text": "caf\xe9"}]', ["3: not UTF-8 text (byte 0xe9)"]),
    "a list with a late NUL": ("a.json", LIST.encode() + b" " * 999 + b"\n\0", ["9: a NUL byte"]),
    "a list of numbers": ("a.json", b"[1,\n2]", ["1: a number, not an object", "2: a number, not an object"]),
    "a faulty record before the end breaks off": ("a.json", b'[7,\n{"te', ["1: a number", "2: not JSON"]),
    "a deeply nested list": ("a.json", b'[{"text":"a"},\n' + b"[" * 10**5, ["2: nested too deeply"]),
    "a list with a huge number": ("a.json", b'[{"text":\n' + b"7" * 5000 + b"}]", ["1: a number of too many digits"]),
    "an object without a list": ("a.json", b'{"text":\n"a"}', ["2: an object without a list of records"]),
    "an object with two lists": ("a.json", b'{"a": [],\n"b": []}', ["2: a second list, 'b' beside 'a'"]),
    "an object cut off": ("a.json", b'{"data": [{"text":"a"}],\n', ["2: not JSON ('\"' expected"]),
    "one conversation": ("a.json", b'{"messages": [{"role": "user"}]}', ["1: one record and not a list"]),
    "a string": ("a.json", b'"hello"', ["1: not JSON ('[' expected, '\"' found)"]),
    "JSON lines in .json, with a fault": ("a.json", jsonl([GOOD, {"text": 7}]), ['2: "text" is a number']),
    "a ragged table": (
        "a.csv",
        b"prompt,completion\na,b\na\na,b,c\n",
        ["3: 1 field(s), the header has 2", "4: 3 field(s)"],
    ),
    "a ragged table behind a quoted line end": ("a.csv", b'text,id\n"a\n\nb",1\nc\n', ["5: 1 field(s)"]),
    "a ragged table of tabs": ("a.tsv", b"prompt\tcompletion\na,b\n", ["2: 1 field(s), the header has 2"]),
    "no header": ("a.csv", b"hi,hello\nho,hullo\n", ["1: no known shape (keys: 'hi', 'hello')"]),
    "two columns of one name": ("a.csv", b"text,id,text\na,b,c\n", ["1: two columns named 'text'"]),
    "a quote never closed": ("a.csv", b'text\na\n"b\nc\n', ["3: not CSV (a quote that is never closed)"]),
    "text after a quote": ("a.csv", b'text\n"a" b\n', ["2: not CSV (',' expected"]),
    "a table in Latin-1": ("a.csv", b"text,id\na,1\ncaf\xe9,2\ncaf\xe9,3\n", ["3: not UTF-8 text (byte 0xe9)"]),
    "a table in UTF-16": ("a.csv", "text\na\n".encode("utf-16"), ["1: UTF-16 text"]),
    "a table with a byte order mark and a fault": ("a.csv", codecs.BOM_UTF8 + b'text,id\r\n"",1\r\n', ['2: "text" is']),
    "a truncated parquet file": ("a.parquet", TEXTS[:-20], ["row 1: not a whole parquet file ("]),
    "half a parquet file": ("a.parquet", TEXTS[: len(TEXTS) // 2], ["row 1: not a whole parquet file"]),
    "junk in a parquet file": ("a.parquet", damaged(TEXTS, 4, b"\xff" * 300), ["row 1: not a whole parquet file"]),
    "JSON lines named .parquet": ("a.parquet", jsonl([GOOD]), ["row 1: not a whole parquet file"]),
    "parquet with no known column": ("a.parquet", parquet([{"url": "a"}]), ["1: no known shape (keys: 'url')"]),
    "parquet text that is not UTF-8": (
        "a.parquet",
        parquet([{"text": "caffee"}, GOOD]).replace(b"caffee", b"caff\xe9\xe9"),
        ["row 1: not UTF-8 text"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file(tmp_path, case):
    name, content, expected = FILES[case]
    (tmp_path / name).write_bytes(content)
    assert_told(faults_of(tmp_path / name), tmp_path / name, expected)


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_empty_file(tmp_path, suffix):
    for content in (b"", codecs.BOM_UTF8, b"\n \n") if suffix != "parquet" else (parquet([GOOD][:0]),):
        (tmp_path / f"a.{suffix}").write_bytes(content)
        (fault,) = faults_of(tmp_path / f"a.{suffix}")
        assert_clear([fault])
        assert "no examples in it" in fault or "no known shape (keys: none)" in fault


def test_only_so_many_faults_are_shown(tmp_path):
    source = write(tmp_path, "jsonl", [{"text": ""}] * 25)
    faults = faults_of(source)
    assert_told(faults[:20], source, [f'{n}: "text" is empty' for n in range(1, 21)])
    assert faults[20:] == ("… and 5 more faults; mend them, or leave them out: data.on_error=skip",)


def test_one_example_is_not_enough(tmp_path):
    source = write(tmp_path, "jsonl", [GOOD])
    assert faults_of(source) == (f"{source}: 1 example(s) leave none to train on; add more",)


# What a path may be instead of a data file: made by a function, and what is said.
PATHS = {
    "no such file": ("x.jsonl", lambda path: None, "no such file; did you mean orders.jsonl?"),
    "no such folder": ("no/x.csv", lambda path: None, "no such file; try DATA=cafe"),
    "an empty folder": ("texts", Path.mkdir, "no .txt or .md file in this folder"),
    "a folder named .jsonl": ("x.jsonl", Path.mkdir, "a folder, not a .jsonl file; did you mean orders.jsonl?"),
    "a broken link": ("x.jsonl", lambda path: path.symlink_to("nowhere"), "a link to nothing"),
    "a link to itself": ("x.jsonl", lambda path: path.symlink_to(path), "a link to nothing"),
    "a pipe": ("x.jsonl", os.mkfifo, "not a regular file"),
    "a device": ("x.jsonl", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a spreadsheet": ("x.xlsx", Path.touch, "not a data file"),
    "a single text": ("x.txt", Path.touch, "not a data file"),
    "no suffix": ("x", Path.touch, "not a data file"),
}


@pytest.mark.parametrize("case", PATHS)
def test_a_path_that_is_no_data(tmp_path, case):
    name, make, words = PATHS[case]
    write(tmp_path, "jsonl", [GOOD])
    make(tmp_path / name)
    (fault,) = faults_of(tmp_path / name)
    assert_clear([fault])
    assert fault.startswith(f"{tmp_path / name}: {words}")
    assert "try DATA=cafe or a .jsonl" in fault


def test_a_folder_with_no_text_names_the_data_file_in_it(tmp_path):
    write(tmp_path, "csv", [GOOD])
    (fault,) = faults_of(tmp_path)
    assert f"{tmp_path}: no .txt or .md file in this folder; choose from: orders.csv" in fault


def test_bad_texts_in_a_folder_are_told_one_by_one(tmp_path):
    for name, content in {
        "a.txt": b"good", "b.txt": b"caf\xe9", "c.md": b"line\n\xff", "d.txt": b" ", "e.txt": b"\xff\xfea\0", "f.txt": b"x"
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "g.txt").symlink_to("nowhere")
    (tmp_path / "h.txt").mkdir()
    faults = faults_of(tmp_path)
    assert_clear(faults)
    told = [
        "b.txt:1: not UTF-8",
        "c.md:2: not UTF-8",
        'd.txt: "text" is empty',
        "e.txt:1: UTF-16",
        "g.txt: cannot be read",
    ]
    assert len(faults) == len(told)
    for fault, words in zip(faults, told, strict=True):
        assert fault.startswith(f"{tmp_path}/{words}")
    assert len(data.read(Data(source=str(tmp_path), on_error="skip")).left_out) == 5


@pytest.fixture
def as_nobody():
    """A folder that everybody may enter, and for root the rights of nobody, whom a file's mode can stop."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    if os.getuid() == 0:
        os.seteuid(0)
    # Who is not root cannot empty what may not be entered.
    for path in folder.iterdir():
        path.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize("suffix", WRITERS)
def test_permission_denied(as_nobody, suffix):
    source = write(as_nobody, suffix, [GOOD])
    Path(source).chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    assert faults_of(source) == (f"{source}: cannot be read (Permission denied); try another file",)


def test_a_folder_that_may_not_be_entered(as_nobody):
    (as_nobody / "in").mkdir()
    source = write(as_nobody / "in", "jsonl", [GOOD])
    (as_nobody / "in").chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    (fault,) = faults_of(source)
    assert fault.startswith(f"{source}: cannot be read (Permission denied); try another path")


# A file with something long in it, read with a limit of 1 MiB: its name, how it begins, what fills it, how it ends, the faults, and how
# many MiB reading it may take. JSON that is not one object a line is held whole: the text, and a window on it.
LONG = {
    "a line": ("a.jsonl", b'{"text": "', b"a", b'"}\n{"text": 7}\n', ["1: a line of more than 1 MiB", "2: "], 8),
    "a list on one line": ("a.json", '[{"text": "☕'.encode(), b"a", b'"}]', ["1: a value of more than 1 MiB"], 100),
    "a record of empty objects": ("a.json", b"[[", b"{}," * 8, b"{}]]", ["1: a value of more than 1 MiB"], 100),
    "a field": ("a.csv", b'text\n"', b"a" * 63 + b"\n", b'"\n', ["2: not CSV (a field of more than"], 16),
    "a row": ("a.csv", b"text\n", b"a", b"\n", ["2: a line of more than 1 MiB"], 8),
}


@pytest.mark.parametrize("case", LONG)
def test_a_line_of_20_mb_does_not_take_the_memory(tmp_path, monkeypatch, case):
    name, start, filling, end, expected, most = LONG[case]
    (tmp_path / name).write_bytes(start + 20 * (MIB // len(filling)) * filling + end)
    for module in (sources, textfile):
        monkeypatch.setattr(module, "MAX_LINE", MIB)
    tracemalloc.start()
    faults = faults_of(tmp_path / name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < most * MIB
    assert_told(faults, tmp_path / name, expected)


def test_a_json_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[\n")
    os.truncate(tmp_path / "a.json", 257 * MIB)
    # Past the head, which would show that it is full of holes.
    with (tmp_path / "a.json").open("r+b") as file:
        file.write(b"[" + b" " * 2000 + b"\n")
    assert_told(
        faults_of(tmp_path / "a.json"), tmp_path / "a.json", ["1: larger than 256 MiB; write one object a line"]
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", jsonl([GOOD, {"text": 7}, {"prompt": "a"}]), ["a.jsonl:2: ", "a.jsonl:3: "]),
        ("a.json", b'[{"text": "a"},\n{"text"', ["a.json:2: not JSON"]),
        ("a.csv", table([{"question": "a", "answer": "b"}]), ["a.csv:1: no known shape"]),
        ("a.parquet", TEXTS[:-20], ["a.parquet:row 1: not a whole parquet file"]),
        ("a.jsonl", gzip.compress(jsonl([GOOD])), ["a.jsonl:1: compressed with gzip"]),
        ("a.xlsx", b"PK", ["a.xlsx: not a data file"]),
    ],
    ids=["records", "a list cut off", "no known column", "truncated parquet", "gzip", "a spreadsheet"],
)
def test_the_command_ends_with_2_and_tells_each_fault(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    done = run_python("-m", "launcher", "plan", f"DATA={tmp_path / name}", light=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(says)
    for line, words in zip(lines, says, strict=True):
        assert line.startswith("error: ")
        assert words in line
