"""Each shape is recognised by itself and becomes the same conversation."""

import json

import pytest

from launcher.shapes import ShapeError, conversation, unknown_keys


def turns(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


SHORT = turns("Two lattes.", "Here you are.")
LONG = turns("Hi.", "Hello.", "Two lattes.", "Here you are.", system="Be brief.")
SHAREGPT = [{"from": "human", "value": "Two lattes."}, {"from": "gpt", "value": "Here you are."}]

GOOD = {
    "messages": ("messages", {"messages": SHORT}, SHORT),
    "messages, a bare list": ("messages", LONG, LONG),
    "messages, several turns": ("messages", {"messages": LONG}, LONG),
    "messages as JSON text": ("messages", {"messages": json.dumps(LONG)}, LONG),
    "messages beside a system prompt": ("messages", {"system": "Be brief.", "messages": LONG[1:]}, LONG),
    "messages with other keys in the turns": ("messages", {"messages": [{**m, "name": None} for m in SHORT]}, SHORT),
    "messages beside a prompt": ("messages", {"prompt": "x", "prompt_id": 7, "messages": SHORT}, SHORT),
    "sharegpt": ("sharegpt", {"id": "x1", "conversations": SHAREGPT}, SHORT),
    "sharegpt as JSON text": ("sharegpt", {"conversations": json.dumps(SHAREGPT)}, SHORT),
    "sharegpt, other names": (
        "sharegpt",
        {"conversations": [{"from": "user", "value": "Two lattes."}, {"from": "chatgpt", "value": "Here you are."}]},
        SHORT,
    ),
    "sharegpt, a system turn": (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT]},
        turns("Two lattes.", "Here you are.", system="Be brief."),
    ),
    "sharegpt, a system key": (
        "sharegpt",
        {"system": "Be brief.", "conversations": SHAREGPT},
        turns("Two lattes.", "Here you are.", system="Be brief."),
    ),
    "alpaca": ("alpaca", {"instruction": "Two lattes.", "output": "Here you are."}, SHORT),
    "alpaca, empty input": ("alpaca", {"instruction": "Two lattes.", "input": "", "output": "Here you are."}, SHORT),
    "alpaca, null input": ("alpaca", {"instruction": "Two lattes.", "input": None, "output": "Here you are."}, SHORT),
    "alpaca, input": (
        "alpaca",
        {"instruction": "Say it.", "input": "No.", "output": "No!"},
        turns("Say it.\n\nNo.", "No!"),
    ),
    "alpaca with its text column": (
        "alpaca",
        {"instruction": "Two lattes.", "input": "", "output": "Here you are.", "text": "Below is an instruction …"},
        SHORT,
    ),
    "alpaca, history": (
        "alpaca",
        {
            "instruction": "Two lattes.",
            "output": "Here you are.",
            "history": [["Hi.", "Hello."]],
            "system": "Be brief.",
        },
        LONG,
    ),
    "prompt-completion": ("prompt-completion", {"prompt": "Two lattes.", "completion": "Here you are."}, SHORT),
    "prompt-response": ("prompt-completion", {"prompt": "Two lattes.", "response": "Here you are."}, SHORT),
    "prompt-completion, messages": ("prompt-completion", {"prompt": LONG[:-1], "completion": LONG[-1:]}, LONG),
    "text": ("text", {"text": "Once upon a time.\n"}, [{"role": "text", "content": "Once upon a time.\n"}]),
    "text, the other columns null": (
        "text",
        {"messages": None, "prompt": None, "text": "Once."},
        [{"role": "text", "content": "Once."}],
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_shape_is_recognised(case):
    shape, record, wanted = GOOD[case]
    assert conversation(record) == (shape, wanted)


def test_a_fault_is_one_short_line_however_long_the_record():
    for record in (
        {"messages": [{"role": "x" * 10**6, "content": "a"}]},
        {"k\ney" * 10**5: 1},
        {str(n): n for n in range(10**4)},
    ):
        with pytest.raises(ShapeError) as error:
            conversation(record)
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)


def test_columns_are_known_by_the_names_of_any_shape():
    assert unknown_keys(["id", "prompt", "completion"]) is None
    assert "keys: 'question', 'answer'" in str(unknown_keys(["question", "answer"]))
