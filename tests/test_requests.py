"""What a client can rely on for one request: it runs once, ends once, can be taken up again, and leaves room for others."""

import asyncio
import hashlib
import signal

from serve.client import connect
from serve.pieces import Answer, Delta
from serve.protocol import Kind, Message
from tests.client_fixtures import break_connections, quick
from tests.serve_fixtures import Box, RawClient, box, text_of, wait_until

__all__ = ["box", "quick"]


def take(client: RawClient, answer: Answer, count: int | None = None) -> Message:
    """Read `count` deltas into the answer, or all to the end; the last message."""
    while True:
        message = client.receive("data")
        if message.request != answer.request:
            continue
        answer.take(message)
        count = count and count - (message.kind is Kind.DELTA)
        if message.kind in (Kind.DONE, Kind.ERROR) or count == 0:
            return message


def test_an_answer_is_taken_up_again_where_it_was(box: Box) -> None:
    box.daemon(0.005)
    text = "".join(chr(97 + i % 26) for i in range(240))
    first = RawClient(box.record())
    first.__enter__()
    answer = Answer({"messages": [{"role": "user", "content": text}]}, first.session)
    request = answer.request
    first.send("data", answer.submit())
    take(first, answer, 20)
    # On the same sockets: what is on its way comes as well.
    first.send("data", answer.resubmit())
    take(first, answer, 20)
    first.__exit__()
    with RawClient(box.record(), first.session) as again, RawClient(box.record()) as stranger:
        assert again.session == first.session
        assert stranger.session != first.session
        stranger.submit(text, request)
        assert stranger.receive("data").body["code"] == "E_BAD_REQUEST"
        again.send("data", answer.resubmit())
        last = take(again, answer)
        assert "".join(answer.texts) == text
        assert last.body["digest"] == hashlib.sha256(text.encode()).hexdigest()
        tokens = again.status()["tokens"]
        assert tokens == len(text)
        # It is over: the rest as one, and nothing runs again.
        again.submit(text, request, have=3)
        deltas, end = again.collect(request)
        assert [d.body["n"] for d in deltas] == [3]
        assert "".join(answer.texts[:3]) + deltas[0].body["text"] == text
        assert end == last
        stranger.submit(text, request)
        assert stranger.receive("data").body["code"] == "E_BAD_REQUEST"
        assert again.status()["tokens"] == tokens
        assert again.status()["requests"] == {"stop": 1}


def test_a_client_whose_connections_broke_goes_on(box: Box, quick: None) -> None:
    box.daemon(0.01)
    text = "".join(chr(97 + i % 26) for i in range(200))

    async def talk() -> tuple[str, int]:
        heard = ""
        with await connect(box.record()) as client:
            async for piece in client.ask([{"role": "user", "content": text}]):
                heard += piece.text if isinstance(piece, Delta) else ""
                if isinstance(piece, Delta) and piece.tokens == 20:
                    break_connections(client, box.record())
            return heard, (await client.status())["requests"]

    assert asyncio.run(talk()) == (text, {"stop": 1})


def test_a_deadline_ends_a_request_and_frees_its_slot(box: Box) -> None:
    box.daemon(0.01, "serve.slots=1")
    with RawClient(box.record()) as client:
        late = client.submit("x" * 900, deadline_ms=500)
        waiting = client.submit("y" * 900, deadline_ms=200)
        assert client.collect(waiting)[1].body["detail"] == {"deadline_ms": 200, "tokens": 0}
        deltas, last = client.collect(late)
        assert (last.body["code"], last.body["detail"]["deadline_ms"]) == ("E_DEADLINE", 500)
        assert last.body["detail"]["tokens"] == deltas[-1].body["tokens"] > 0
        wait_until(lambda: client.status()["busy_slots"] == 0)
        assert client.collect(client.submit("ok"))[1].kind is Kind.DONE


def test_the_queue_and_the_share_of_a_client_are_bounded(box: Box) -> None:
    box.daemon(0.01, "serve.slots=1", "serve.share=4", "serve.queue=6")
    with RawClient(box.record()) as greedy, RawClient(box.record()) as modest, RawClient(box.record()) as late:
        running = greedy.submit("x" * 900)
        while greedy.receive("data").kind is not Kind.DELTA:
            pass
        for _ in range(5):
            greedy.submit("abc")
        refusal = next(m for m in iter(lambda: greedy.receive("data"), None) if m.kind is Kind.ERROR)
        assert refusal.body["code"] == "E_QUEUE_FULL" and refusal.body["retryable"]
        assert refusal.body["detail"].items() >= {"waiting": 4, "max": 4}.items()
        assert 100 <= refusal.body["detail"]["retry_after_ms"] <= 30_000
        mine = modest.submit("mine")
        accepted = modest.receive("data")
        assert (accepted.kind, accepted.body["position"], accepted.body["prompt_tokens"]) == (Kind.ACCEPTED, 4, 5)
        assert type(accepted.body["seed"]) is int and accepted.body["temperature"] == 0.0
        modest.submit("two")
        wait_until(lambda: greedy.status()["waiting"] == 6)
        _, last = late.collect(late.submit("x"))
        assert last.body["detail"].items() >= {"waiting": 6, "max": 6}.items()
        greedy.cancel(running)
        # The slot is free: clients take turns, and its place is told while it waits.
        deltas, _ = modest.collect(mine)
        assert text_of(deltas) == "mine"


def test_a_place_in_the_queue_is_told_and_a_cancel_may_come_first(box: Box) -> None:
    box.daemon(0.01, "serve.slots=1")
    with RawClient(box.record()) as client:
        first, second = client.submit("x" * 900), client.submit("y" * 900)
        waiting = client.submit("z")
        while (message := client.receive("data")).kind is not Kind.ACCEPTED or message.request != waiting:
            pass
        wait_until(lambda: client.status()["waiting"] == 2)
        client.cancel(second)
        places = []
        while not places:
            message = client.receive("data")
            if message.request == waiting and message.kind is Kind.PROGRESS and message.body["stage"] == "queued":
                places.append((message.body["done"], message.body["total"]))
        assert places == [(0, 1)]
        client.cancel(first)
        assert client.collect(waiting)[1].kind is Kind.DONE
        early = bytes(range(16))
        client.cancel(early)
        client.status()
        client.submit("too late", early)
        deltas, last = client.collect(early)
        assert (deltas, last.body["code"]) == ([], "E_CANCELLED")
        assert client.collect(client.submit("next"))[1].kind is Kind.DONE


def test_a_flood_on_one_socket_does_not_hold_up_the_other(box: Box) -> None:
    daemon = box.daemon(0.0, "serve.queue=10000", "serve.share=10000")
    with RawClient(box.record()) as client:
        daemon.send_signal(signal.SIGSTOP)
        for _ in range(900):
            client.submit("x" * 100)
        client.send("control", Message(Kind.STATUS))
        daemon.send_signal(signal.SIGCONT)
        status = client.receive("control").body
        # It was answered with most of the flood still unread.
        assert status["waiting"] + status["busy_slots"] + sum(status["requests"].values()) < 450
