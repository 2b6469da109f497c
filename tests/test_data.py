"""Reading and splitting."""

import json

import pytest

from launcher import data
from launcher.config import Data
from launcher.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write(tmp_path, *lines):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(file)


def faults_of(source):
    with pytest.raises(UserError) as error:
        data.read(Data(source=source))
    return error.value.faults


def test_every_fault_is_told_with_its_line(tmp_path):
    def talk(*turns):
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    source = write(
        tmp_path,
        GOOD,
        "{not json",
        {"texts": "no messages"},
        talk(("user", "a"), ("user", "b")),
        talk(("user", "a"), ("assistant", "  ")),
        talk(("robot", "a")),
        talk(("assistant", "a")),
        talk(("user", "a")),
        talk(("user", "a"), ("system", "b"), ("assistant", "c")),
    )
    faults = faults_of(source)
    assert [fault.split(":")[1] for fault in faults] == ["2", "3", "4", "5", "6", "7", "8", "9"]
    assert "two user turns" in faults[2]


def test_the_embedded_task_is_known_by_its_shape_and_places():
    splits = data.read(Data(limit=7))
    assert splits.shapes == {"messages": 2200}
    assert splits.train_places == tuple(f"cafe:{n}" for n in range(1, 8))
    assert len(splits.held_out_places) == len(splits.held_out) == 200


def test_every_example_keeps_its_place(tmp_path):
    source = write(tmp_path, *({"prompt": f"q{n}", "completion": "a"} for n in range(1, 51)))
    splits = data.read(Data(source=source, limit=30))
    assert (len(splits.train), len(splits.held_out)) == (30, 5)
    for places, split in ((splits.train_places, splits.train), (splits.held_out_places, splits.held_out)):
        assert places == tuple(f"{source}:{messages[0]['content'][1:]}" for messages in split)


def test_empty_files(tmp_path):
    assert "no examples" in faults_of(write(tmp_path, ""))[0]
    assert "leave none to train on" in faults_of(write(tmp_path, GOOD))[0]


def test_the_split_is_seeded_and_disjoint(tmp_path):
    lines = [json.loads(json.dumps(GOOD).replace("hi", f"hi {i}")) for i in range(50)]
    source = write(tmp_path, *lines)
    first, second = data.read(Data(source=source)), data.read(Data(source=source))
    assert first == second
    assert len(first.held_out) == 5
    assert len(first.train) == 45
    assert not [m for m in first.held_out if m in first.train]


def test_a_changed_file_is_noticed(tmp_path):
    lines = [json.loads(json.dumps(GOOD).replace("hi", f"hi {i}")) for i in range(50)]
    before = data.read(Data(source=write(tmp_path, *lines)))
    before.require(before.fingerprint, "x")
    after = data.read(Data(source=write(tmp_path, *lines, GOOD)))
    with pytest.raises(UserError, match="has changed since"):
        after.require(before.fingerprint, "x")
