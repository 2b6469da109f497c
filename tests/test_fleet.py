"""Which engine answers: the one that has read the beginning of the conversation, unless others have to wait less."""

import json

import pytest

from serve.fleet import EngineState, Fleet
from serve.submission import Submission


def test_a_conversation_stays_with_its_engine_unless_that_has_a_queue() -> None:
    fleet = Fleet()
    for number in range(2):
        fleet.engines[number] = EngineState("ready", {"num_slots": 2})
    first = Submission([{"role": "user", "content": "a"}])
    assert fleet.choose(first) == 0
    fleet.remember(first, "b", 1)
    again = [*first.messages, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert fleet.choose(Submission(again)) == 1
    assert fleet.choose(Submission(again, adapter="other")) == 0
    fleet.engines[1].open |= {b"1", b"2"}
    assert fleet.choose(Submission(again)) == 0
    fleet.engines[1].open.clear()
    fleet.forget(1)
    assert fleet.choose(Submission(again)) == 0
    fleet.engines[0].state = fleet.engines[1].state = "down"
    assert fleet.choose(first) is None


def test_a_conversation_of_many_turns_is_looked_up_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet()
    for number in range(2):
        fleet.engines[number] = EngineState("ready", {"num_slots": 2})
    turns = [{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(9_999)]
    fleet.remember(Submission(turns[:-2]), "x", 1)
    read, dumps = [], json.dumps
    monkeypatch.setattr(json, "dumps", lambda part: read.append(part) or dumps(part))
    assert fleet.choose(Submission(turns)) == 1
    # Clients and engines wait meanwhile; with each turn read once for every one behind it, it was half a minute.
    assert len(turns) - 1 <= len(read) <= len(turns) + 1
