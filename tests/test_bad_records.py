"""Bad records: each fault is known by its line in every format that can hold it."""

import json

import pytest

from tests.data_files import assert_told, faults_of, write

GOOD = {"text": "A good one."}


def talk(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def share(*turns):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


# A record that is wrong, and what is said. Each is tried in all formats that can hold it.
RECORDS = {
    "messages: an unknown role": (talk(("robot", "a")), "message 1: unknown role 'robot'; choose from: system, user"),
    "messages: a tool turn": (talk(("user", "a"), ("tool", "b"), ("assistant", "c")), "message 2: unknown role 'tool'"),
    "messages: a capital role": (talk(("User", "a"), ("Assistant", "b")), "unknown role 'User'"),
    "messages: a null role": ({"messages": [{"role": None, "content": "a"}]}, "unknown role None"),
    "messages: no role": ({"messages": [{"content": "a"}]}, 'message 1 has no "role"'),
    "messages: no content": ({"messages": [{"role": "user"}]}, 'message 1 has no "content"'),
    "messages: an empty answer": (talk(("user", "a"), ("assistant", "  ")), 'message 2: "content" is empty'),
    "messages: a tool call": (talk(("user", "a"), ("assistant", None)), 'message 2: "content" is null'),
    "messages: content in parts": (talk(("user", [{"type": "text"}])), 'message 1: "content" is a list, not text'),
    "messages: two user turns": (talk(("user", "a"), ("user", "b")), "message 2: two user turns in a row; join them"),
    "messages: two answers": (
        talk(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        "message 3: two assistant turns in a row",
    ),
    "messages: a late system turn": (talk(("user", "a"), ("system", "b")), "message 2: a system turn must come first"),
    "messages: the assistant first": (talk(("assistant", "a")), "message 1: the assistant speaks first"),
    "messages: no user turn": (talk(("system", "a"), ("assistant", "b")), "message 2: the assistant speaks first"),
    "messages: no answer": (talk(("user", "a")), "the last turn is the user's, so there is nothing to learn"),
    "messages: a lone surrogate": (talk(("user", "\ud83d"), ("assistant", "b")), 'message 1: "content" holds \\ud83d'),
    "messages: none": ({"messages": []}, "no messages"),
    "messages: null": ({"messages": None}, '"messages" is null, not a list'),
    "messages: a number": ({"messages": 7}, '"messages" is a number, not a list'),
    "messages: an object": ({"messages": {"role": "user"}}, '"messages" is an object, not a list'),
    "messages: strings": ({"messages": ["hi", "ho"]}, "message 1 is a string, not an object"),
    "messages: not JSON text": ({"messages": "[{'role': 'user'}]"}, '"messages" is text that is not JSON'),
    "sharegpt: an unknown speaker": (share(("human", "a"), ("gpt4", "b")), "unknown role 'gpt4'; choose from: human"),
    "sharegpt: the model first": (share(("gpt", "a"), ("human", "b")), "message 1: the assistant speaks first"),
    "sharegpt: two turns": (share(("human", "a"), ("user", "b")), "message 2: two user turns in a row"),
    "sharegpt: no answer": (share(("human", "a")), "the last turn is the user's"),
    "sharegpt: an empty answer": (share(("human", "a"), ("gpt", "")), 'message 2: "value" is empty'),
    "sharegpt: no value": ({"conversations": [{"from": "human"}]}, 'message 1 has no "value"'),
    "sharegpt: two system turns": (
        {"system": "a", **share(("system", "b"), ("gpt", "c"))},
        "two system turns in a row",
    ),
    "alpaca: no output": ({"instruction": "a", "input": "b"}, "no \"output\" (keys: 'instruction', 'input'); add it"),
    "alpaca: no instruction": ({"input": "a", "output": "b"}, 'no "instruction"'),
    "alpaca: an empty output": ({"instruction": "a", "output": ""}, '"output" is empty'),
    "alpaca: a number": ({"instruction": "a", "output": 12}, '"output" is a number, not text'),
    "alpaca: a null instruction": ({"instruction": None, "output": "b"}, '"instruction" is null'),
    "alpaca: a list as input": ({"instruction": "a", "input": ["b"], "output": "c"}, '"input" is a list, not text'),
    "alpaca: half a pair": ({"instruction": "a", "output": "b", "history": [["c"]]}, '"history" 1 is not a pair'),
    "alpaca: an empty pair": (
        {"instruction": "a", "output": "b", "history": [["c", ""]]},
        'the answer of "history" 1 is empty',
    ),
    "prompt: no completion": ({"prompt": "a", "id": "b"}, 'no "completion"'),
    "prompt: no prompt": ({"completion": "a"}, 'no "prompt"'),
    "prompt: an empty completion": ({"prompt": "a", "completion": "\n"}, '"completion" is empty'),
    "prompt: a null response": ({"prompt": "a", "response": None}, '"response" is null'),
    "prompt: an object": ({"prompt": {"a": "b"}, "completion": "c"}, '"prompt" is an object, not text'),
    "prompt: ends with the user": ({"prompt": talk(("user", "a"))["messages"], "completion": []}, "the last turn is"),
    "text: empty": ({"text": " "}, '"text" is empty'),
    "text: a list": ({"text": ["a"]}, '"text" is a list, not text'),
    "text: a lone surrogate": ({"text": "a \udc00 b"}, '"text" holds \\udc00, half of a character'),
    "no known shape": ({"question": "a", "answer": "b"}, "no known shape (keys: 'question', 'answer'); name them"),
    "no keys": ({}, "no known shape (keys: none)"),
    "a number": (7, "a number, not an object"),
    "a string": ("hello", "a string, not an object"),
    "null": (None, "null, not an object"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_bad_record_in_json(tmp_path, case):
    record, words = RECORDS[case]
    lines = write(tmp_path, "jsonl", [GOOD, record, GOOD, record])
    assert_told(faults_of(lines), lines, [f"2: {words}", f"4: {words}"])
    (tmp_path / "list.json").write_bytes(json.dumps([GOOD, record], indent=None).replace("}, ", "},\n", 1).encode())
    assert_told(faults_of(tmp_path / "list.json"), tmp_path / "list.json", [f"2: {words}"])


# What is no object, or has no known column, is another fault in a table; half a character cannot be written there.
ROWS = [case for case in RECORDS if ":" in case and "surrogate" not in case]


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_record_in_parquet(tmp_path, case):
    record, words = RECORDS[case]
    source = write(tmp_path, "parquet", [record] * 3)
    assert_told(faults_of(source), source, [f"row {n}: {words}" for n in (1, 2, 3)])


def is_cell(key, value):
    """Whether a cell of text can hold it: turns are read from JSON."""
    return isinstance(value, str) or (isinstance(value, list) and key in ("messages", "conversations"))


@pytest.mark.parametrize("case", [case for case in ROWS if all(is_cell(*cell) for cell in RECORDS[case][0].items())])
def test_a_bad_record_in_csv(tmp_path, case):
    record, words = RECORDS[case]
    for suffix in ("csv", "tsv"):
        source = write(tmp_path, suffix, [record])
        assert_told(faults_of(source), source, [f"2: {words}"])
