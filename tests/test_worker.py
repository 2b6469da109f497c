"""Turns of an engine: how much of the prompts each reads, and what it says to the daemon at once."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from serve.bundle import Bundle, unpack
from serve.echo import EchoEngine
from serve.engine import Read, Sampling
from serve.inbox import TURN_SECONDS, Inbox
from serve.pace import ALONE_CHUNKS, ALONE_SECONDS, FIRST, SECONDS, UNIT, Pace, num_read_together
from serve.protocol import Kind, Message, encode
from serve.worker import Worker
from tests.test_broker import Wires


def test_short_prompts_are_read_together_and_a_long_one_alone() -> None:
    assert num_read_together([40, 40, 40, 40], 128) == 3
    assert num_read_together([500, 5], 128) == 1
    assert num_read_together([5, 500], 128) == 1
    assert num_read_together([1], 128) == 1


def test_a_chunk_is_what_the_engine_was_told_until_that_takes_too_long() -> None:
    pace = Pace(512)
    assert (pace.chunk(3), pace.chunk(0), Pace(16).chunk(1)) == (FIRST, FIRST, 16)
    pace.took(FIRST, 0.02)
    assert (pace.chunk(0), pace.chunk(1)) == (ALONE_CHUNKS * 512, 512)
    pace.took(512, 4.0)
    assert pace.chunk(3) == UNIT == 128 * SECONDS
    assert pace.chunk(0) == 2 * UNIT == 128 * ALONE_SECONDS


def test_a_slow_chunk_is_forgotten_and_a_small_one_tells_nothing() -> None:
    pace = Pace(512)
    pace.took(pace.chunk(1), 100.0)
    for _ in range(10):
        chunk = pace.chunk(1)
        # A machine that reads 1000 tokens a second, and takes 50 ms for none at all.
        pace.took(chunk, 0.05 + chunk / 1000)
    assert 0.15 < 0.05 + pace.chunk(1) / 1000 <= SECONDS
    before = pace.chunk(1)
    pace.took(3, 0.05)
    assert pace.chunk(1) == before


class Slow(EchoEngine):
    """Notes how much it was asked to read at once."""

    def __init__(self) -> None:
        super().__init__(num_slots=16)
        self.chunks: list[int] = []

    def prefill(self, slots: list[int], chunk: int = 0) -> list[Read]:
        self.chunks.append(chunk)
        return super().prefill(slots, chunk)


def submit(worker: Worker, number: int, text: str) -> None:
    worker.receive(Message(Kind.SUBMIT, bytes([number]) * 16, {"messages": [{"role": "user", "content": text}]}))


def test_a_slow_engine_reads_less_at_once(monkeypatch) -> None:
    monkeypatch.setenv("AFINAR_ECHO_DELAY", "0.5")
    engine = Slow()
    worker = Worker(engine, lambda message: None)
    submit(worker, 1, "x" * 1900)
    for _ in range(3):
        worker.turn()
    assert engine.chunks == [FIRST, UNIT, UNIT]


def test_what_a_step_says_to_all_is_one_message() -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as daemon, context.socket(zmq.PAIR) as link:
        daemon.bind("inproc://engine")
        link.connect("inproc://engine")
        bundle = Bundle(link)
        worker = Worker(EchoEngine(num_slots=16), bundle.add, bundle.send)
        for number in range(16):
            submit(worker, number, "hi!")
            assert [message.kind for message in unpack(daemon.recv_multipart())] == [Kind.ACCEPTED]
        said = []
        while not worker.is_idle:
            worker.turn()
            while daemon.poll(0):
                said.append(list(unpack(daemon.recv_multipart())))
        assert not link.poll(0)
        # The prompts with their first words, and a bundle a step: "i!", and the end of all.
        firsts = said[: -len("hi!")]
        assert {message.kind for each in firsts for message in each} == {Kind.PROGRESS, Kind.DELTA}
        steps = said[-len("hi!") :]
        assert [len({message.request for message in step}) for step in steps] == [16] * len("hi!")
        assert [{message.kind for message in step} for step in steps] == [{Kind.DELTA}] * 2 + [{Kind.DONE}]


class Pensive(EchoEngine):
    """Takes most of the time between two turns to read a conversation, and notes which it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def prompt_ids(self, messages: list[dict[str, Any]], context: int | None = None) -> list[int]:
        self.asked.append(messages[0]["content"])
        time.sleep(0.75 * TURN_SECONDS)
        return super().prompt_ids(messages, context)


@contextlib.contextmanager
def linked(engine: EchoEngine) -> Iterator[tuple["zmq.Socket[bytes]", Inbox, Worker]]:
    """The daemon's end of a link, and what an engine process has at the other."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as daemon, context.socket(zmq.PAIR) as link:
        daemon.bind("inproc://engine")
        link.connect("inproc://engine")
        bundle = Bundle(link)
        worker = Worker(engine, bundle.add, bundle.send)
        yield daemon, Inbox(link, worker), worker


def tell(daemon: "zmq.Socket[bytes]", kind: Kind, number: int, text: str = "") -> None:
    body = {"messages": [{"role": "user", "content": text}]} if text else {}
    daemon.send_multipart(encode(Message(kind, bytes([number]) * 16, body)))


def heard(daemon: "zmq.Socket[bytes]") -> list[tuple[Kind, int]]:
    """What the engine has said since, as (kind, number of the request)."""
    said = []
    while daemon.poll(0):
        said += [(message.kind, message.request[0]) for message in unpack(daemon.recv_multipart())]
    return said


def test_a_flood_of_questions_stops_no_answer_and_delays_no_cancel() -> None:
    engine = Pensive()
    with linked(engine) as (daemon, inbox, worker):
        for number in (1, 2):
            tell(daemon, Kind.SUBMIT, number, "x" * 100)
            inbox.take()
        while worker.table.waiting or worker.table.reading:
            worker.turn()
        heard(daemon)
        for number in range(10, 30):
            tell(daemon, Kind.TOKENIZE, number, "question")
        tell(daemon, Kind.CANCEL, 1)
        counts = []
        while len(engine.asked) < 22:
            inbox.take()
            said = heard(daemon)
            if not counts:
                assert said.pop(0) == (Kind.ERROR, 1)
            assert {kind for kind, _ in said} == {Kind.TOKENIZE}
            counts.append(len(said))
            worker.turn()
            # The answer goes on as it would without any question.
            assert heard(daemon) == [(Kind.DELTA, 2)]
        # Two that take three quarters of the time each; where this machine pauses, one.
        assert set(counts) <= {1, 2} and sum(counts) == 20


def test_a_cancel_takes_back_what_was_not_read_yet() -> None:
    engine = Pensive()
    with linked(engine) as (daemon, inbox, worker):
        for number, text in enumerate(("a", "b", "c", "d")):
            tell(daemon, Kind.SUBMIT, number, text)
        tell(daemon, Kind.CANCEL, 3)
        inbox.take()
        assert heard(daemon)[0] == (Kind.ERROR, 3)
        # One that waits in the worker, or has a slot already, goes as well.
        tell(daemon, Kind.CANCEL, 0)
        while not (worker.is_idle and inbox.is_empty):
            inbox.take()
            worker.turn()
        said = heard(daemon)
        assert [number for kind, number in said if kind is Kind.ERROR] == [0]
        assert [number for kind, number in said if kind is Kind.DONE] == [1, 2]
        assert engine.asked == ["a", "b", "c"]
        # Of a request that is not known: over it is.
        tell(daemon, Kind.CANCEL, 9)
        tell(daemon, Kind.SUBMIT, 9, "e")
        inbox.take()
        assert heard(daemon) == [(Kind.ERROR, 9), (Kind.ACCEPTED, 9)]


def test_what_waits_is_taken_in_its_order() -> None:
    with linked(EchoEngine()) as (daemon, inbox, _):
        for number in range(5):
            tell(daemon, (Kind.SUBMIT, Kind.TOKENIZE)[number % 2], number, "x")
        inbox.take()
        assert [number for _, number in heard(daemon)] == list(range(5))


class Broken(EchoEngine):
    """Fails at all that `fails` says."""

    def __init__(self, fails: Callable[[str, int], bool], fault: Exception) -> None:
        super().__init__()
        self._fails, self._fault = fails, fault

    def _try(self, what: str, length: int) -> None:
        if self._fails(what, length):
            raise self._fault

    def start(self, slot: int, ids: list[int], sampling: Sampling, adapter: str) -> int:
        self._try("start", len(ids))
        return super().start(slot, ids, sampling, adapter)

    def prefill(self, slots: list[int], chunk: int = 0) -> list[Read]:
        self._try("prefill", max(self._read[slot][1] for slot in slots))
        return super().prefill(slots, chunk)


@pytest.mark.parametrize("what", ["start", "prefill"])
def test_a_device_that_reads_no_prompt_at_all_is_noticed(what: str) -> None:
    sent: list[Message] = []
    worker = Worker(Broken(lambda at, _: at == what, RuntimeError("device-side assert")), sent.append)
    submit(worker, 1, "hello")
    with pytest.raises(RuntimeError, match="device-side assert"):
        worker.turn()
    assert sent[-1].body["code"] == "E_ENGINE"


@pytest.mark.parametrize("what", ["start", "prefill"])
@pytest.mark.parametrize(("least", "fault"), [(5, RuntimeError("a hard prompt")), (0, MemoryError())])
def test_prompts_that_cannot_be_read_end_only_themselves(what: str, least: int, fault: Exception) -> None:
    sent: list[Message] = []
    engine = Broken(lambda at, length: at == what and length >= least, fault)
    worker = Worker(engine, sent.append)
    for number in range(10):
        submit(worker, number, "hard to read")
        worker.turn()
        assert sent[-1].body["code"] == ("E_OOM" if least == 0 else "E_ENGINE") and worker.is_idle
    # Whatever it was, it has left nothing behind.
    engine._fails = lambda *_: False
    submit(worker, 10, "hello")
    while not worker.is_idle:
        worker.turn()
    assert sent[-1].kind is Kind.DONE and not engine._answers


def test_an_older_version_of_an_adapter_goes_and_the_base_never(tmp_path: Path) -> None:
    worker = Worker(EchoEngine(), lambda message: None)
    for name in ("one", "base"):
        (tmp_path / name).mkdir()
        for prefix in ("old", "new"):
            (tmp_path / name / "prefix").write_text(prefix)
            worker.receive(Message(Kind.LOAD, body={"run": str(tmp_path / name)}))
    worker.turn()
    keys = [adapter.key for adapter in worker.engine.info.adapters]
    assert "base" in keys and [key.partition("@")[0] for key in keys].count("one") == 1


class Recording(EchoEngine):
    """Cannot record its second step, nor any other."""

    def step(self) -> dict[int, int]:
        tokens = super().step()
        if self.info.graphs != "off: no memory" and any(len(answer) < 5 for answer in self._answers.values()):
            self.info = dataclasses.replace(self.info, graphs="off: no memory")
        return tokens


def test_what_became_of_the_graphs_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[Message] = []
    worker = Worker(Recording(), sent.append)
    wires = Wires(is_ready=False)
    wires.hear(Message(Kind.READY, body={"info": dataclasses.asdict(worker.engine.info)}))
    assert wires.broker.status()["info"]["graphs"] == "off"
    for number in range(2):
        submit(worker, number, "hello again")
        while not worker.is_idle:
            worker.turn()
    (news,) = (message for message in sent if message.kind is Kind.ADAPTERS)
    wires.hear(news)
    assert wires.broker.status()["info"]["graphs"] == "off: no memory"
    assert capsys.readouterr().out == "CUDA graphs: off: no memory\n"
