"""The same conversations come out of every format, whatever else is in the file."""

import json

import pytest

from launcher import data
from launcher.compose import check
from launcher.config import Data
from launcher.errors import UserError
from launcher.sources import Record, records
from launcher.variables import check_data
from tests.data_files import WRITERS, jsonl, write

ORDERS = [(f"An espresso, number {n}, por favor.", f"Ahí va, {n}: ¡un «espresso»!\nAnd a napkin.") for n in range(30)]
WANTED = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ORDERS]
# Each in the form that a table can hold too.
SHAPES = {
    "messages": [{"messages": talk, "id": n} for n, talk in enumerate(WANTED)],
    "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in ORDERS],
    "alpaca": [{"instruction": q, "input": "", "output": a, "source": "x"} for q, a in ORDERS],
    "prompt-completion": [{"prompt": q, "completion": a} for q, a in ORDERS],
}


def read(source, **options):
    """Every conversation with its place, in the order of the file, and the shapes."""
    splits = data.read(Data(source=str(source), **options))
    places = dict(zip(splits.train_places + splits.held_out_places, splits.train + splits.held_out, strict=True))
    return [places[item.where] for item in records(Data(source=str(source)))], splits.shapes


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_format_gives_the_same_conversations(tmp_path, shape, suffix):
    assert read(write(tmp_path, suffix, SHAPES[shape])) == (WANTED, {shape: 30})


@pytest.mark.parametrize("suffix", WRITERS)
def test_plain_text_is_one_message(tmp_path, suffix):
    texts = [{"text": f"Línea {n}\nand more"} for n in range(5)]
    assert read(write(tmp_path, suffix, texts)) == (
        [[{"role": "text", "content": t["text"]}] for t in texts],
        {"text": 5},
    )


LINES = jsonl(SHAPES["messages"])
FILES = {
    "with a byte order mark": ("orders.jsonl", b"\xef\xbb\xbf" + LINES),
    "with CRLF": ("orders.jsonl", LINES.replace(b"\n", b"\r\n")),
    "with blank lines and no last line end": ("orders.jsonl", LINES.replace(b"\n", b"\n\n").strip()),
    "a capital suffix": ("ORDERS.JSONL", LINES),
    "JSON lines in a .json file": ("orders.json", LINES),
    "a list on one line": ("orders.json", json.dumps(SHAPES["messages"]).encode()),
    "a list with a byte order mark and CRLF": (
        "orders.json",
        b"\xef\xbb\xbf" + json.dumps(SHAPES["messages"], indent=4).replace("\n", "\r\n").encode(),
    ),
    "a list in an object": (
        "orders.json",
        json.dumps({"version": 1, "about": {"of": [1, 2]}, "data": SHAPES["messages"], "end": None}).encode(),
    ),
    "a table with a byte order mark": ("orders.csv", b"\xef\xbb\xbf" + WRITERS["csv"](SHAPES["alpaca"])),
}


@pytest.mark.parametrize("name", FILES)
def test_files_as_other_programs_write_them(tmp_path, name):
    file, content = FILES[name]
    (tmp_path / file).write_bytes(content)
    assert read(tmp_path / file)[0] == WANTED


def test_a_table_may_be_separated_by_semicolons(tmp_path):
    (tmp_path / "orders.csv").write_text("prompt;completion\nUno, dos;Tres, cuatro\nA;B\n", encoding="utf-8")
    assert [[m["content"] for m in talk] for talk in read(tmp_path / "orders.csv")[0]] == [
        ["Uno, dos", "Tres, cuatro"],
        ["A", "B"],
    ]


def test_records_are_known_by_the_line_they_begin_on(tmp_path):
    def lines(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return [int(item.where.rpartition(":")[2].split()[0]) for item in records(Data(source=str(tmp_path / name)))]

    assert lines("a.jsonl", '{"text":"a"}\n\n{"text":"b"}\n') == [1, 3]
    assert lines("a.json", '{"v": 1,\n"data":\n[{"text":\n"a"}, {"text": "b"}\n,\n\n{"text": "c"}]}') == [3, 4, 7]
    assert lines("a.csv", 'prompt,completion\n"a\n\nb",c\n\n"d",e\n') == [2, 6]


def test_a_json_file_larger_than_the_window_is_read_whole(tmp_path, monkeypatch):
    from launcher import jsonwalk

    monkeypatch.setattr(jsonwalk, "WINDOW", 7)
    assert read(write(tmp_path, "json", SHAPES["sharegpt"]))[0] == WANTED
    (tmp_path / "n.json").write_text('[1234567890, -12.5e-10, true, null, "\\ud83d\\ude00", 7]')
    found = [item.value for item in records(Data(source=str(tmp_path / "n.json")))]
    assert found == [1234567890, -12.5e-10, True, None, "😀", 7]


def test_a_folder_of_texts(tmp_path):
    (tmp_path / "b" / ".git").mkdir(parents=True)
    (tmp_path / "b" / "two.md").write_bytes(b"\xef\xbb\xbf# Two\r\nlines\r\n")
    (tmp_path / "a.TXT").write_text("One, café")
    (tmp_path / "b" / ".git" / "no.txt").write_text("hidden")
    (tmp_path / "b" / "no.py").write_text("no text")
    assert list(records(Data(source=str(tmp_path)))) == [
        Record(str(tmp_path / "a.TXT"), {"text": "One, café"}),
        Record(str(tmp_path / "b" / "two.md"), {"text": "# Two\nlines\n"}),
    ]


def test_faulty_records_can_be_left_out(tmp_path):
    good = [{"prompt": f"q{n}", "completion": "a"} for n in range(9)]
    source = write(tmp_path, "jsonl", [*good, {"prompt": "q", "completion": ""}, {"text": "t"}])
    splits = data.read(Data(source=source, on_error="skip"))
    assert splits.left_out == (f'{source}:10: "completion" is empty; write some text, or remove it',)
    assert (len(splits.train), len(splits.held_out)) == (9, 1)
    assert splits.shapes == {"prompt-completion": 9, "text": 1}


@pytest.mark.parametrize("num_good", [0, 1])
def test_what_is_left_must_be_enough(tmp_path, num_good):
    source = write(tmp_path, "jsonl", [{"text": "good"}] * num_good + [{"text": ""}] * 50)
    with pytest.raises(UserError) as error:
        data.read(Data(source=source, on_error="skip"))
    assert error.value.faults[0].startswith(f"{source}: {'1 example(s) leave none' if num_good else 'no examples'}")
    assert error.value.faults[1].startswith(f'{source}:{num_good + 1}: "text" is empty')
    assert "… and 31 more faults" in error.value.faults[-1]


def test_a_file_that_breaks_off_is_never_left_out(tmp_path):
    (tmp_path / "orders.json").write_text('[{"text": "a"},\n {"text": "b"},\n {"text"')
    with pytest.raises(UserError, match=r"orders\.json:3: not JSON"):
        data.read(Data(source=str(tmp_path / "orders.json"), on_error="skip"))


@pytest.mark.parametrize("option", ["subset", "split", "revision", "on_error"])
@pytest.mark.parametrize("source", ["cafe", "orders.jsonl", "./texts", "org/orders.csv"])
def test_an_option_without_effect_is_an_error(source, option):
    values = {"source": source, option: "skip" if option == "on_error" else "x"}
    if option == "on_error" and source != "cafe":
        assert check({"data": values}).data.on_error == "skip"
        return
    with pytest.raises(UserError, match=f"data.{option}: .*; try without it"):
        check({"data": values})


def test_a_hub_dataset_takes_its_options():
    given = {"source": "org/orders", "subset": "en", "split": "test", "revision": "v1"}
    assert check({"data": given}).data.subset == "en"


def test_which_sources_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "texts").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "my" / "texts" / "a.txt").write_text("a")
    (tmp_path / "my" / "orders.ndjson").write_text("{}")
    for good in ("cafe", "my/texts", "my/orders.ndjson", "org/name", "HuggingFaceH4/no_robots", "org/v1.5"):
        assert check_data(good) is None, good
    for bad, says in {
        "my/ordres.jsonl": "no such file; did you mean orders.ndjson?",
        "org/name.parquet": "no such file; try DATA=cafe",
        "./orders": "no such file",
        "cofe": "unknown data; did you mean cafe?",
        "empty": "no .txt or .md file",
        "x" * 5000: "cannot be read (File name too long)",
    }.items():
        assert says in str(check_data(bad)), bad
