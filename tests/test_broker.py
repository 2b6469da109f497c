"""The broker with both its ends in hand: credit, slow readers, loading; and the worker that no request can end."""

import io
import tracemalloc
from typing import Any

from serve.broker import Broker
from serve.clients import PROBE_SECONDS, Clients
from serve.echo import EchoEngine
from serve.engine import Read
from serve.open_requests import Lane, OpenRequest, Remembered, Sent, Session
from serve.progress import Progress
from serve.protocol import CREDIT_WINDOW, Code, Kind, Message
from serve.settings import Settings
from serve.submission import Submission
from serve.worker import Worker

ID = b"r" * 16
INFO = {"context": 2048, "num_slots": 8, "adapters": []}
DONE = {"reason": "stop", "usage": {}, "timings": {}}


class Wires:
    """Keeps what the broker sends; `outcome` is what becomes of it."""

    def __init__(self, is_ready: bool = True) -> None:
        self.outcome = Sent.OK
        self.to_client: list[tuple[Lane, Message]] = []
        self.to_engine: list[Message] = []
        self.broker = Broker(self._send, lambda number, message: self.to_engine.append(message), Settings())
        self.broker.dispatch.engine_starts(0, 1)
        if is_ready:
            self.hear(Message(Kind.READY, body={"info": INFO}))

    def _send(self, lane: Lane, receiver: bytes, message: Message) -> Sent:
        if self.outcome is Sent.OK:
            self.to_client.append((lane, message))
        return self.outcome

    def take(self, lane: Lane) -> list[Message]:
        taken = [message for on, message in self.to_client if on is lane]
        self.to_client = [(on, message) for on, message in self.to_client if on is not lane]
        return taken

    def hear(self, message: Message) -> None:
        self.broker.dispatch.on_engine(0, message)

    def greet(self) -> bytes:
        self.broker.on_control(b"c", Message(Kind.HELLO, body={"proto": [1]}))
        return bytes(self.take(Lane.CONTROL)[0].body["session"])

    def submit(self, request: bytes = ID, **options: Any) -> None:
        body = {"messages": [{"role": "user", "content": "x"}], "session": self.greet(), **options}
        self.broker.on_data(b"d", Message(Kind.SUBMIT, request, body))

    def delta(self, text: str, tokens: int = 1) -> None:
        self.hear(Message(Kind.DELTA, ID, {"text": text, "tokens": tokens}))


def test_loading_is_shown_and_requests_wait_for_its_end() -> None:
    wires = Wires(is_ready=False)
    progress = Message(Kind.PROGRESS, body={"stage": "weights", "done": 1, "total": 2})
    wires.hear(progress)
    wires.broker.on_control(b"c", Message(Kind.HELLO, body={"proto": [1]}))
    welcome, shown = wires.take(Lane.CONTROL)
    assert (welcome.body["state"], shown) == ("loading", progress)
    wires.submit()
    assert wires.to_engine == []
    wires.hear(Message(Kind.READY, body={"info": INFO}))
    assert [m.kind for m in wires.to_engine] == [Kind.SUBMIT]
    welcome = wires.take(Lane.CONTROL)[-1]
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


def test_a_full_socket_delays_and_a_client_that_left_may_come_back() -> None:
    wires = Wires()
    wires.submit()
    wires.outcome = Sent.FULL
    wires.delta("a")
    wires.delta("b", 2)
    wires.outcome = Sent.OK
    wires.broker.tick()
    (delta,) = wires.take(Lane.DATA)
    assert (delta.body["n"], delta.body["text"]) == (0, "ab")
    wires.outcome = Sent.GONE
    wires.delta("c", 3)
    wires.broker.tick()
    # There is some grace: nothing is cancelled yet.
    assert [m.kind for m in wires.to_engine] == [Kind.SUBMIT]
    assert wires.broker.status()["clients"] == 0
    wires.outcome = Sent.OK
    wires.broker.on_control(b"c", Message(Kind.PING, ID))
    assert [m.body["attached"] for m in wires.take(Lane.CONTROL)] == [False]
    wires.submit(have=1)
    wires.hear(Message(Kind.DONE, ID, DONE))
    assert [(m.kind, m.body.get("n"), m.body.get("text")) for m in wires.take(Lane.DATA)] == [
        (Kind.DELTA, 1, "c"),
        (Kind.DONE, None, None),
    ]


def test_a_repeated_submit_runs_once_and_ends_once() -> None:
    wires = Wires()
    wires.submit()
    wires.submit()
    assert len(wires.to_engine) == 1
    wires.broker.on_control(b"c", Message(Kind.CANCEL, ID))
    wires.broker.on_control(b"c", Message(Kind.CANCEL, ID))
    wires.delta("late")
    wires.hear(Message(Kind.DONE, ID, DONE))
    wires.broker.tick()
    (last,) = wires.take(Lane.DATA)
    assert last.body["code"] == Code.CANCELLED


def test_an_adapter_that_is_about_to_be_loaded_waits_in_the_same_queue() -> None:
    wires = Wires(is_ready=False)
    wires.hear(Message(Kind.READY, body={"info": {**INFO, "adapters": [vars(EchoEngine().info.adapters[0])]}}))
    wires.broker.administration.runs["one"] = "runs/one"
    for number in range(Settings().share):
        wires.submit(b"%016d" % number)
    wires.take(Lane.DATA)
    wires.submit(adapter="one")
    (refusal,) = wires.take(Lane.DATA)
    assert refusal.body["code"] == Code.QUEUE_FULL


def test_an_engine_without_work_does_not_hang() -> None:
    wires = Wires()
    engine = wires.broker.fleet.engines[0]
    engine.last_heard -= 1000
    wires.submit()
    assert wires.broker.hung() == []
    engine.last_heard -= 1000
    assert wires.broker.hung() == [0]


def test_an_answer_is_remembered_in_little_memory_and_comes_back_in_its_parts() -> None:
    number = 20_000
    tracemalloc.start()
    request = OpenRequest(ID, b"d", Session(b"c", 1), Submission([]))
    request.texts, request.sent_ids = [f"é{i % 10}" for i in range(number)], [[i] for i in range(number)]
    as_parts, _ = tracemalloc.get_traced_memory()
    remembered = Remembered()
    remembered.add(request)
    in_one_piece, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert in_one_piece < 15 * number < as_parts / 10
    assert remembered.find(ID) is request
    request = remembered.take(ID)
    assert request.texts == [f"é{i % 10}" for i in range(number)] and request.sent_ids == [[i] for i in range(number)]
    assert remembered.find(ID) is None


def test_clients_that_came_together_are_probed_in_parts() -> None:
    probed: list[bytes] = []

    def send(lane: Lane, receiver: bytes, message: Message) -> Sent:
        probed.append(receiver)
        return Sent.GONE if receiver == b"7" else Sent.OK

    clients = Clients(send, lambda session: None)
    for number in range(250):
        session = clients.greet(b"%d" % number, Message(Kind.HELLO, body={"proto": [1]}))
        assert session is not None
        session.last_probe -= PROBE_SECONDS + 1
    counts = []
    for _ in range(4):
        clients.tick(Message(Kind.PONG))
        counts.append(len(probed))
    assert counts == [100, 200, 250, 250] and len(set(probed)) == 250
    assert len(list(clients)) == 249


class Fragile(EchoEngine):
    """Cannot take a prompt of more than 5 tokens."""

    def prefill(self, slots: list[int], chunk: int = 0) -> list[Read]:
        if any(self._read[slot][1] > 5 for slot in slots):
            raise RuntimeError("out of luck\nand a long story")
        return super().prefill(slots, chunk)


def test_what_one_request_does_to_the_engine_ends_only_that_request() -> None:
    sent: list[Message] = []
    worker = Worker(Fragile(), sent.append)

    def submit(name: bytes, text: str, **options: Any) -> None:
        body = {"messages": [{"role": "user", "content": text}], **options}
        worker.receive(Message(Kind.SUBMIT, name * 16, body))

    submit(b"b", "too long for it")
    worker.turn()
    submit(b"a", "abc")
    submit(b"c", "abc", max_tokens=1)
    while not worker.is_idle:
        worker.turn()
    endings = {m.request[:1]: m for m in sent if m.kind in (Kind.DONE, Kind.ERROR)}
    assert endings[b"a"].body["reason"] == "stop"
    assert (endings[b"b"].body["code"], endings[b"b"].body["message"]) == ("E_ENGINE", "out of luck")
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
