"""A client that reads nothing for a while: what found its connection full comes when it reads again."""

import os
from collections import Counter

import pytest

from serve.open_requests import Lane, Sent
from serve.outbox import MAX_KEPT, Outbox
from serve.protocol import Kind, Message
from tests.serve_fixtures import Box, RawClient, box, text_of, wait_until

__all__ = ["box"]
# More than both sockets and the kernel between them hold.
MANY = 5000


def read_all(client: RawClient, lane: str) -> list[Message]:
    """What comes until nothing has come for a second."""
    received = []
    while client.sockets[lane].poll(1000):
        received.append(client.receive(lane))
    return received


def test_every_submit_has_its_answers_although_the_connection_was_full(box: Box) -> None:
    box.daemon()
    with RawClient(box.record()) as client:
        refused = [client.submit("x", temperature=-1) for _ in range(MANY)]
        good = client.submit("words")
        again = client.submit("more words")
        wait_until(lambda: client.status()["requests"].get("stop") == 2)
        # Sent again meanwhile, as a client does that misses an answer.
        client.submit("x", refused[-1], have=0)
        client.status()
        received = read_all(client, "data")
        assert len(received) < MANY, "the connection was never full"
        ends = Counter(m.request for m in received if m.kind in (Kind.DONE, Kind.ERROR))
        assert [ends[request] for request in refused[-MAX_KEPT:]] == [1] * MAX_KEPT
        for request, text in ((good, "words"), (again, "more words")):
            mine = [m for m in received if m.request == request]
            kinds = [m.kind for m in mine if m.kind is not Kind.PROGRESS]
            assert kinds[0] is Kind.ACCEPTED and kinds[-1] is Kind.DONE and kinds.count(Kind.ACCEPTED) == 1
            assert text_of([m for m in mine if m.kind is Kind.DELTA]) == text


def test_a_question_is_answered_although_the_connection_was_full(box: Box) -> None:
    box.daemon(0.05)
    with RawClient(box.record()) as client:
        running = client.submit("x" * 900)
        for _ in range(MANY):
            client.send("control", Message(Kind.PING))
        turns = [{"role": "user", "content": "x"}]
        questions = {os.urandom(16): kind for kind in (Kind.STATUS, Kind.TOKENIZE, Kind.ADAPTERS, Kind.LOAD)}
        for request, kind in questions.items():
            client.send("control", Message(kind, request, {"messages": turns, "run": "x"}))
        # When the last message on control has been heard, so have all before it.
        client.cancel(running)
        assert client.collect(running)[1].body["code"] == "E_CANCELLED"
        received = read_all(client, "control")
        assert len(received) < MANY, "the connection was never full"
        assert {m.request for m in received if m.request in questions} == set(questions)


@pytest.mark.parametrize("outcome", [Sent.OK, Sent.GONE])
def test_only_the_newest_are_kept_and_nothing_for_who_has_gone(outcome: Sent) -> None:
    results: list[Sent] = [Sent.FULL]
    tried: list[int] = []

    def send(lane: Lane, receiver: bytes, message: Message) -> Sent:
        tried.append(message.body["number"])
        return results[-1]

    outbox = Outbox(send)
    for number in range(MAX_KEPT + 5):
        assert outbox.send(Lane.DATA, b"r", Message(Kind.ERROR, bytes(16), {"number": number})) is Sent.FULL
    assert tried == [0] and outbox.holds(Lane.DATA, b"r", bytes(16))
    results.append(outcome)
    outbox.tick()
    outbox.tick()
    assert tried[1:] == list(range(5, MAX_KEPT + 5)) and not outbox.holds(Lane.DATA, b"r", bytes(16))
    assert outbox.send(Lane.DATA, b"r", Message(Kind.ERROR, bytes(16), {"number": 99})) is outcome
