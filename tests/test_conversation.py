"""A conversation's events and what stands because of them."""

import copy
import random

import pytest

from serve.chat.conversation import SUMMARY_LEAD, Conversation, count_exchanges, ending, replay
from serve.chat.conversation_events import (
    KINDS,
    Adapter,
    Answer,
    Begin,
    Drop,
    Edit,
    Event,
    NewerError,
    Others,
    Params,
    Regenerate,
    Reset,
    Summary,
    System,
    Undo,
    User,
    Withdraw,
    from_line,
    to_line,
)
from tests.support.share import first

TEXTS = ["hello", "", "dos\nlíneas", "\u2028\x1b[31m\r", "half \ud83d", '{"kind": "user"}', "```py\nx\n", "🦊" * 50]


def drawn(draw: random.Random) -> Event:
    """Any event, legal or not."""
    text = draw.choice(TEXTS)
    return draw.choice(
        [
            Begin("runs/x", "m", draw.choice(["x", "y"]), draw.random()),
            System(text),
            User(text),
            User(text),
            Answer(text, draw.random() < 0.3, "x", {"completion_tokens": draw.randrange(9)}),
            Answer(text),
            Answer("words"),
            Withdraw(),
            Undo(),
            Edit(text),
            Regenerate(),
            Reset() if draw.random() < 0.3 else Undo(),
            Drop(draw.randrange(-1, 4)),
            Summary(text),
            Adapter("y"),
            Params({"temperature": 0.5, "stop": ["a"]}),
            Others({"y": text}),
        ]
    )


def drawn_events(seed: int, count: int = 60) -> tuple[list[Event], set[str], int]:
    """Legal events, their kinds, and how many illegal ones were refused without a trace."""
    draw, conversation, refused = random.Random(seed), Conversation(), 0
    while len(conversation.events) < count:
        event = drawn(draw)
        if conversation.problem(event):
            before = copy.deepcopy(conversation)
            with pytest.raises(AssertionError):
                conversation.apply(event)
            assert conversation == before
            refused += 1
        else:
            conversation.apply(event)
    return conversation.events, {type(event).__name__.lower() for event in conversation.events}, refused


def check_invariants(conversation: Conversation, events: list[Event]) -> None:
    messages = conversation.messages()
    if messages and messages[0]["role"] == "system":
        assert messages.pop(0)["content"] == conversation.system
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"] * (
        len(messages) % 2
    )
    assert len(messages) % 2 == (conversation.open_question is not None)
    assert len(messages) // 2 == conversation.num_exchanges - conversation.num_dropped
    if conversation.open_question is not None:
        assert messages[-1]["content"].endswith(conversation.open_question)
    assert conversation.events == events
    assert count_exchanges(type(event).__name__.lower() for event in events) == conversation.num_exchanges


@pytest.mark.parametrize("seeds", first(1, [range(40), range(40, 200)]), ids=str)
def test_turns_alternate_whatever_happens_and_the_events_tell_it_again(seeds: range) -> None:
    seen: set[str] = set()
    refused = 0
    for seed in seeds:
        events, kinds, num_refused = drawn_events(seed)
        seen, refused = seen | kinds, refused + num_refused
        conversation = Conversation()
        for number, event in enumerate(events, start=1):
            conversation.apply(event)
            check_invariants(conversation, events[:number])
        assert replay(events) == conversation
        assert replay(from_line(to_line(event)) for event in events) == conversation
    assert seen == set(KINDS) and refused > 1000


def talk(*events: Event) -> Conversation:
    return replay([Begin("runs/x", "m", "x", 0.0), *events])


def contents(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages()]


def test_an_answer_is_interrupted_or_its_question_withdrawn() -> None:
    conversation = talk(User("one"), Answer("1"), User("two"), ending("2, but", is_interrupted=True))
    assert contents(conversation) == ["one", "1", "two", "2, but"]
    last = conversation.exchanges[-1].answer
    assert last and last.is_interrupted
    conversation.apply(User("three"))
    assert conversation.open_question == "three"
    conversation.apply(ending("", is_interrupted=True))
    assert contents(conversation) == ["one", "1", "two", "2, but"] and conversation.num_exchanges == 2
    # A model may end at once.
    assert ending("", is_interrupted=False, adapter="x") == Answer("", adapter="x")
    with pytest.raises(ValueError, match="has a word at least"):
        talk(User("one"), Answer("", is_interrupted=True))


def test_undo_edit_and_regenerate() -> None:
    said: list[Event] = [User("one"), Answer("1"), User("two"), Answer("2")]
    assert contents(talk(*said, Undo())) == ["one", "1"]
    assert contents(talk(*said, Edit("zwei"))) == ["one", "1", "zwei"]
    assert talk(*said, Regenerate()).open_question == "two"
    assert contents(talk(*said, Regenerate(), Answer("2b"))) == ["one", "1", "two", "2b"]
    # What is asked again and gets not a word leaves what was there.
    for again in ([Regenerate()], [Edit("zwei")], [Edit("zwei"), Edit("deux")], [Regenerate(), Edit("zwei")]):
        assert contents(talk(*said, *again, Withdraw())) == ["one", "1", "two", "2"]
    assert contents(talk(*said, User("three"), Edit("drei"), Withdraw())) == ["one", "1", "two", "2"]
    assert contents(talk(*said, Regenerate(), Answer("2b"), Undo())) == ["one", "1"]


def test_what_is_dropped_is_not_sent_and_a_summary_stands_for_it() -> None:
    said: list[Event] = [System("s"), User("one"), Answer("1"), User("two"), Answer("2"), User("three")]
    assert contents(talk(*said, Drop(1))) == ["s", "two", "2", "three"]
    assert contents(talk(*said, Drop(1), Summary("we counted"))) == [
        "s",
        f"{SUMMARY_LEAD}we counted\n\ntwo",
        "2",
        "three",
    ]
    dropped = talk(*said, Drop(1), Drop(1), Summary("we counted"))
    assert contents(dropped) == ["s", f"{SUMMARY_LEAD}we counted\n\nthree"] and dropped.num_exchanges == 2
    assert contents(talk(*said, Drop(2), Summary("a"), Summary(""))) == ["s", "three"]
    for event, problem in ((Drop(3), "2 exchanges"), (Drop(0), "2 exchanges"), (Summary("x"), "nothing is dropped")):
        with pytest.raises(ValueError, match=problem):
            talk(*said, event)
    with pytest.raises(ValueError, match="1 exchanges can be dropped, not 2"):
        talk(*said, Drop(1), Drop(2))
    # A dropped question that is asked again is sent.
    again = talk(*said[:-1], Drop(2), Summary("a"), Regenerate())
    assert contents(again) == ["s", f"{SUMMARY_LEAD}a\n\ntwo"]
    assert contents(talk(*said[:-1], Drop(2), Summary("a"), Undo(), Undo(), User("new"))) == ["s", "new"]


def test_settings_and_a_new_beginning() -> None:
    conversation = talk(System("s"), Params({"seed": 1}), User("one"), Answer("1"), Adapter("y"), Others({"y": "eins"}))
    assert (conversation.adapter, conversation.params, conversation.run) == ("y", {"seed": 1}, "runs/x")
    assert conversation.exchanges[0].others == {"y": "eins"}
    conversation.apply(Reset())
    assert contents(conversation) == ["s"] and conversation.num_exchanges == 0
    assert Answer("1") in conversation.events
    conversation.apply(Begin("runs/z", "n", "z", 1.0))
    assert (conversation.run, conversation.model, conversation.adapter) == ("runs/z", "n", "z")


@pytest.mark.parametrize(
    ("line", "problem", "kind"),
    [
        ("{", "not a line of JSON", ValueError),
        ("[" * 100_000, "not a line of JSON", ValueError),
        ("3", "not an event", ValueError),
        ('{"text": "x"}', "not an event", ValueError),
        ('{"kind": "user"}', "user without all it needs", ValueError),
        ('{"kind": "user", "text": 3}', "user with 'text' of a wrong type", ValueError),
        ('{"kind": "drop", "num_exchanges": true}', "wrong type", ValueError),
        ('{"kind": "others", "answers": {"a": 3}}', "wrong type", ValueError),
        ('{"kind": "laugh"}', "unknown event 'laugh'", NewerError),
        ('{"kind": "user", "text": "x", "mood": 1}', "user with an unknown 'mood'", NewerError),
    ],
)
def test_a_line_that_is_no_event(line: str, problem: str, kind: type[ValueError]) -> None:
    with pytest.raises(ValueError, match=problem) as found:
        from_line(line.encode())
    assert found.type is kind


def test_a_line_may_say_a_whole_number_of_seconds() -> None:
    assert from_line(b'{"kind": "begin", "run": "", "model": "", "adapter": "", "time": 3}') == Begin("", "", "", 3)
    assert to_line(User("ñ")) == '{"kind": "user", "text": "ñ"}\n'.encode()
