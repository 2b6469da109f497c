"""Reading, ordering and batching."""

import json

import pytest
import torch

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
        {"text": "no messages"},
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


def test_not_text_and_empty_files(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00junk")
    assert "not UTF-8" in faults_of(str(tmp_path / "data.jsonl"))[0]
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


def test_an_example_that_is_too_long_is_an_error_with_both_numbers(tokenizer):
    long = [{"role": "user", "content": "latte " * 100}, {"role": "assistant", "content": "ok"}]
    with pytest.raises(UserError, match=r"1 of 2 examples are longer than 50 tokens \(longest: \d+\)"):
        data.encode(tokenizer, [GOOD["messages"], long], 50)


def test_order_visits_every_example_once_an_epoch():
    epochs = [[i for step in range(s, s + 5) for i in data.order(20, 4, step, seed=3)] for s in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert data.order(20, 4, 1, seed=3) != data.order(20, 4, 1, seed=4)


@pytest.mark.parametrize(("world", "micro"), [(1, 16), (1, 4), (2, 4), (4, 2)])
def test_the_processes_share_the_global_batch(world, micro):
    batch = [data.Example([1] * (5 + i), [True] * (5 + i)) for i in range(16)]
    parts = [list(data.micro_batches(batch, rank, world, micro)) for rank in range(world)]
    assert all(len(part) == 16 // (world * micro) for part in parts)
    assert sorted(len(e.ids) for part in parts for m in part for e in m) == [5 + i for i in range(16)]


def test_collate_pads_on_the_right_and_never_trains_padding():
    batch = data.collate([data.Example([5, 6, 7], [False, True, True]), data.Example([5], [True])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["trained"].dtype == torch.bool
    assert batch["trained"].tolist() == [[False, True, True], [True, False, False]]
    assert data.num_trained([data.Example([5, 6, 7], [False, True, True]), data.Example([5], [True])]) == 2
