"""The broker with both its ends in hand: credit, slow readers, loading; and the worker that no request can end."""

import io
from typing import Any

from serve.broker import Broker
from serve.engine import EchoEngine, Sampling
from serve.open_requests import Lane, Sent
from serve.progress import Progress
from serve.protocol import CREDIT_WINDOW, Code, Kind, Message
from serve.worker import Worker

ID = b"r" * 16
INFO = {"context": 2048, "num_slots": 8}


class Wires:
    """Keeps what the broker sends; `outcome` is what becomes of it."""

    def __init__(self) -> None:
        self.outcome = Sent.OK
        self.to_client: list[tuple[Lane, Message]] = []
        self.to_engine: list[Message] = []
        self.broker = Broker(self._send, self.to_engine.append)

    def _send(self, lane: Lane, receiver: bytes, message: Message) -> Sent:
        if self.outcome is Sent.OK:
            self.to_client.append((lane, message))
        return self.outcome

    def take(self, lane: Lane) -> list[Message]:
        taken = [message for on, message in self.to_client if on is lane]
        self.to_client = [(on, message) for on, message in self.to_client if on is not lane]
        return taken

    def greet(self) -> bytes:
        self.broker.on_control(b"c", Message(Kind.HELLO, body={"proto": [1]}))
        return bytes(self.take(Lane.CONTROL)[0].body["session"])

    def submit(self) -> None:
        body = {"messages": [{"role": "user", "content": "x"}], "session": self.greet()}
        self.broker.on_data(b"d", Message(Kind.SUBMIT, ID, body))
        self.take(Lane.DATA)

    def delta(self, text: str, tokens: int = 1) -> None:
        self.broker.on_engine(Message(Kind.DELTA, ID, {"text": text, "tokens": tokens}))


def test_loading_is_shown_and_requests_wait_for_its_end() -> None:
    wires = Wires()
    progress = Message(Kind.PROGRESS, body={"stage": "weights", "done": 1, "total": 2})
    wires.broker.on_engine(progress)
    wires.broker.on_control(b"c", Message(Kind.HELLO, body={"proto": [1]}))
    welcome, shown = wires.take(Lane.CONTROL)
    assert (welcome.body["state"], shown) == ("loading", progress)
    wires.submit()
    assert [m.kind for m in wires.to_engine] == [Kind.SUBMIT]
    wires.broker.on_engine(Message(Kind.READY, body={"info": INFO}))
    (welcome,) = wires.take(Lane.CONTROL)
    assert (welcome.body["state"], welcome.body["info"]) == ("ready", INFO)


def test_without_credit_text_is_held_together() -> None:
    wires = Wires()
    wires.submit()
    for i in range(CREDIT_WINDOW + 5):
        wires.delta("x", i)
    assert len(wires.take(Lane.DATA)) == CREDIT_WINDOW
    wires.broker.on_data(b"stranger", Message(Kind.CREDIT, ID, {"count": 9}))
    assert wires.take(Lane.DATA) == []
    wires.broker.on_data(b"d", Message(Kind.CREDIT, ID, {"count": 9}))
    (held,) = wires.take(Lane.DATA)
    assert (held.body["text"], held.body["n"]) == ("x" * 5, CREDIT_WINDOW)


def test_a_full_socket_delays_and_a_gone_client_is_forgotten() -> None:
    wires = Wires()
    wires.submit()
    wires.outcome = Sent.FULL
    wires.delta("a")
    wires.delta("b")
    wires.broker.on_engine(Message(Kind.DONE, ID, {"reason": "stop", "usage": {}}))
    wires.outcome = Sent.OK
    wires.broker.tick()
    delta, done = wires.take(Lane.DATA)
    assert (delta.body["text"], done.kind) == ("ab", Kind.DONE)
    wires.submit()
    wires.outcome = Sent.GONE
    wires.delta("a")
    assert wires.to_engine[-1].kind is Kind.CANCEL
    assert wires.broker.status()["clients"] == 0


def test_a_repeated_submit_runs_once_and_ends_once() -> None:
    wires = Wires()
    wires.submit()
    wires.submit()
    assert len(wires.to_engine) == 1
    wires.broker.on_control(b"c", Message(Kind.CANCEL, ID))
    wires.broker.on_control(b"c", Message(Kind.CANCEL, ID))
    wires.delta("late")
    wires.broker.on_engine(Message(Kind.DONE, ID, {"reason": "stop", "usage": {}}))
    (last,) = wires.take(Lane.DATA)
    assert last.body["code"] == Code.CANCELLED


class Fragile(EchoEngine):
    """Cannot take a prompt of more than 5 tokens."""

    def prefill(self, slot: int, ids: list[int], sampling: Sampling) -> int:
        if len(ids) > 5:
            raise RuntimeError("out of memory\nand a long story")
        return super().prefill(slot, ids, sampling)


def test_what_one_request_does_to_the_engine_ends_only_that_request() -> None:
    sent: list[Message] = []
    worker = Worker(Fragile(), sent.append)

    def submit(name: bytes, text: str, **options: Any) -> None:
        body = {"messages": [{"role": "user", "content": text}], **options}
        worker.receive(Message(Kind.SUBMIT, name * 16, body))

    submit(b"a", "abc")
    submit(b"b", "too long for it")
    submit(b"c", "abc", max_tokens=1)
    while not worker.is_idle:
        worker.turn()
    endings = {m.request[:1]: m for m in sent if m.kind in (Kind.DONE, Kind.ERROR)}
    assert endings[b"a"].body["reason"] == "stop"
    assert endings[b"b"].body == {"code": "E_ENGINE", "message": "out of memory", "detail": {}}
    assert endings[b"c"].body["reason"] == "length"
    assert sorted(worker.table.occupied) == []


def test_progress_is_one_line_a_stage_where_nobody_watches() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for done in range(3):
        progress.show("weights", done, 2)
    progress.show("warm-up", 0, 0)
    progress.clear()
    assert stream.getvalue() == "loading: weights\nloading: warm-up\n"
