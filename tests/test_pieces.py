"""What has come of an answer: pieces that repeat, that are missing, that belong to another answer, that come too late."""

import hashlib
from typing import Any

import pytest

from serve.errors import RequestError, ServeError
from serve.pieces import Accepted, Answer, Delta, Done, Piece, Waiting
from serve.protocol import Code, Kind, Message, error

ACCEPTED = {"position": 2, "prompt_tokens": 3, "max_tokens": 9, "adapter": "base", "top_k": 4, "seed": 7, "newer": 1}
USAGE = {"completion_tokens": 3}


class Heard(Answer):
    """An answer and a daemon that sends its messages."""

    def __init__(self) -> None:
        super().__init__({"messages": []}, b"session")

    def hear(self, kind: Kind, **body: Any) -> Piece | None:
        return self.take(Message(kind, self.request, body))

    def delta(self, number: int, text: str, *ids: int) -> Delta | None:
        piece = self.hear(Kind.DELTA, n=number, text=text, tokens=9, ids=ids)
        assert piece is None or isinstance(piece, Delta)
        return piece

    def end(self, text: str) -> Piece | None:
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.hear(Kind.DONE, reason="stop", usage=USAGE, timings={"decode_ms": 500.0}, digest=digest)


def test_an_answer_comes_in_pieces() -> None:
    answer = Heard()
    accepted = Accepted(2, 3, 9, "base", {"top_k": 4, "seed": 7})
    assert answer.hear(Kind.ACCEPTED, **ACCEPTED) == accepted
    assert answer.hear(Kind.PROGRESS, stage="queued", done=1, total=2) == Waiting("queued", 1, 2)
    assert answer.delta(0, "a", 5) == Delta("a", 9, (5,))
    # Before the rest of an answer it is said again.
    assert answer.hear(Kind.ACCEPTED, **ACCEPTED) is None
    assert answer.take(Message(Kind.DELTA, b"another request.", {"n": 0, "text": "x", "tokens": 1})) is None
    assert not answer.is_over
    done = answer.end("a")
    assert isinstance(done, Done) and answer.is_over
    assert (done.reason, done.usage, done.tokens_per_second) == ("stop", USAGE, 4.0)


def test_a_replay_may_overlap_what_has_come() -> None:
    answer = Heard()
    told = [(0, "ab", 1, 2), (1, "cd", 3), (1, "cdef", 3, 4, 5), (2, "g", 6), (0, "abcdefg", 1, 2, 3, 4, 5, 6)]
    pieces = [answer.delta(*each) for each in told]
    assert [(piece.text, piece.ids) for piece in pieces if piece] == [
        ("ab", (1, 2)),
        ("cd", (3,)),
        ("ef", (4, 5)),
        ("g", (6,)),
        ("", ()),
    ]
    assert answer.resubmit().body == {"messages": [], "session": b"session", "have": 1}
    assert isinstance(answer.end("abcdefg"), Done)


def test_what_is_missing_damaged_or_another_answer_is_noticed() -> None:
    answer = Heard()
    answer.delta(0, "ab")
    with pytest.raises(ServeError, match="part 1 of the answer is missing; try"):
        answer.delta(2, "c")
    with pytest.raises(ServeError, match="began another; try"):
        answer.delta(0, "a")
    with pytest.raises(ServeError, match="damaged on its way; try"):
        answer.end("abc")


def test_an_error_ends_it() -> None:
    answer = Heard()
    with pytest.raises(RequestError, match="too long") as caught:
        answer.take(error(answer.request, Code.CONTEXT, "too long", need=9))
    assert (caught.value.code, caught.value.detail, answer.is_over) == (Code.CONTEXT, {"need": 9}, True)


def test_after_a_cancel_no_word_comes_and_no_end_but_that() -> None:
    answer = Heard()
    answer.delta(0, "a")
    answer.is_cancelled = True
    assert answer.delta(1, "b") is None
    with pytest.raises(RequestError) as caught:
        answer.end("ab")
    assert (caught.value.code, answer.is_over) == (Code.CANCELLED, True)


def test_it_begins_anew_only_without_words_and_under_another_id() -> None:
    answer = Heard()
    first = answer.submit()
    answer.begin_anew(b"next")
    assert answer.submit().body == {**first.body, "session": b"next"} and answer.request != first.request
    # What was said of the first is none of it.
    assert answer.take(error(first.request, Code.BAD_REQUEST, "say HELLO first")) is None
    answer.delta(0, "a")
    with pytest.raises(ServeError, match="the rest of the answer is lost; try"):
        answer.begin_anew(b"third")
    answer.is_cancelled = True
    with pytest.raises(RequestError, match="cancelled"):
        answer.begin_anew(b"third")
