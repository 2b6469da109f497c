"""Between the clients and the engine processes: sessions, open requests, credit, deadlines, and who is still alive.

No sockets here: `send` carries a message to a client and says what became of it, `forward` carries one to an engine.
"""

import dataclasses
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from serve import submission
from serve.administration import Administration
from serve.clients import Clients
from serve.engine import AdapterError, resolve
from serve.figures import Figures
from serve.fleet import EngineState, Fleet
from serve.limits import limits
from serve.open_requests import Lane, OpenRequest, Remembered, Sent, Session
from serve.outbox import Outbox
from serve.protocol import (
    CREDIT_WINDOW,
    NO_REQUEST,
    SILENCE_SECONDS,
    VERSION,
    Code,
    Kind,
    Message,
    ProtocolError,
    error,
)
from serve.settings import Settings

# A client that has gone may come back for so long before its requests are cancelled.
GRACE_SECONDS = 3.0
MAX_EARLY_CANCELS = 64
PLACE_SECONDS = 0.5

Send = Callable[[Lane, bytes, Message], Sent]
Forward = Callable[[int, Message], None]
Tell = Callable[..., None]


class Broker:
    """Every handler runs to its end before the next message is read, so the state is always whole."""

    def __init__(
        self,
        send: Send,
        forward: Forward,
        settings: Settings,
        admin: str = "",
        log: Tell = lambda *_, **__: None,
        on_leave: Callable[[bool], None] = lambda now: None,
        rss_bytes: Callable[[int], int] = lambda pid: 0,
    ) -> None:
        self._rss_bytes = rss_bytes
        self._outbox = Outbox(send)
        self._send, self._forward, self._settings, self._log = send, forward, settings, log
        self.epoch = secrets.token_hex(8)
        self.state = "loading"
        self.figures = Figures()
        self.fleet = Fleet()
        self._progress: Message | None = None
        self._clients = Clients(send, self._abandon)
        self._requests: dict[bytes, OpenRequest] = {}
        self._remembered = Remembered()
        self._places_told = 0.0
        self.administration = Administration(self._outbox.send, forward, self.fleet, admin, self.status, on_leave, log)

    @property
    def info(self) -> dict[str, Any]:
        """What the engines hold, {} as long as none is ready."""
        return self.fleet.first.info

    # From clients.

    def on_control(self, sender: bytes, message: Message) -> None:
        """HELLO and everything that is not about the words of an answer."""
        if message.kind is Kind.HELLO:
            self._greet(sender, message)
            return
        session = self._clients.speaking(sender)
        if session is None:
            self._outbox.send(Lane.CONTROL, sender, error(message.request, Code.BAD_REQUEST, "say HELLO first"))
            return
        session.spoke()
        if message.kind is Kind.PING:
            request = self._requests.get(message.request)
            is_attached = request is not None and request.session is session and request.lost_at is None
            body = {"epoch": self.epoch, "attached": is_attached}
            self._send(Lane.CONTROL, sender, Message(Kind.PONG, message.request, body))
        elif message.kind is Kind.STATUS:
            self._outbox.send(Lane.CONTROL, sender, Message(Kind.STATUS, message.request, self.status()))
        elif message.kind is Kind.CANCEL:
            self._on_cancel(session, message.request)
        elif not self.administration.on_control(sender, message):
            refusal = error(message.request, Code.UNSUPPORTED, f"{message.kind.name} does not belong on control")
            self._outbox.send(Lane.CONTROL, sender, refusal)

    def on_data(self, sender: bytes, message: Message) -> None:
        """SUBMIT or CREDIT."""
        if message.kind is Kind.SUBMIT:
            try:
                self._submit(sender, message)
            except ProtocolError as fault:
                self._outbox.send(Lane.DATA, sender, error(fault.request, fault.code, str(fault), **fault.detail))
        elif message.kind is Kind.CREDIT:
            request = self._requests.get(message.request)
            if request is not None and request.data == sender:
                request.session.spoke()
                request.credit = min(request.credit + max(message.body["count"], 0), CREDIT_WINDOW)
                self._deliver(request)
        else:
            refusal = error(message.request, Code.UNSUPPORTED, f"{message.kind.name} does not belong on data")
            self._outbox.send(Lane.DATA, sender, refusal)

    def refuse(self, lane: Lane, sender: bytes, fault: ProtocolError) -> None:
        """Answer frames that are no message of ours."""
        # An open request keeps its one ERROR or DONE for its own end.
        if fault.request not in self._requests:
            self._outbox.send(lane, sender, error(fault.request, fault.code, str(fault)))

    def _greet(self, sender: bytes, message: Message) -> None:
        session = self._clients.greet(sender, message)
        if session is not None:
            self._welcome(session)
            if self.state == "loading" and self._progress is not None:
                self._send(Lane.CONTROL, sender, self._progress)

    def _welcome(self, session: Session) -> None:
        body = {"proto": VERSION, "epoch": self.epoch, "session": session.secret, "state": self.state}
        body |= {"info": self.info, "limits": limits(self._settings)}
        self._outbox.send(Lane.CONTROL, session.control, Message(Kind.WELCOME, body=body))

    def _submit(self, sender: bytes, message: Message) -> None:
        session = self._clients.holding(message.body.get("session"))
        if session is None:
            raise ProtocolError(Code.BAD_REQUEST, "say HELLO on control and give its session here", message.request)
        session.spoke()
        if self._is_known(sender, session, message) or self._outbox.holds(Lane.DATA, sender, message.request):
            return
        asked = submission.parse(message.body, message.request)
        if asked.sampling.seed is None:
            asked = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, seed=secrets.randbits(62)))
        self._admit(session, asked, message.request)
        request = self._requests[message.request] = OpenRequest(message.request, sender, session, asked)
        if message.request in session.cancelled:
            self._end(request, Code.CANCELLED, "cancelled", tokens=0)
        else:
            self._place(request)

    def _is_known(self, sender: bytes, session: Session, message: Message) -> bool:
        """A SUBMIT that was seen before never runs again; its client gets what it does not have yet."""
        request = self._requests.get(message.request) or self._remembered.find(message.request)
        if request is None:
            return False
        if request.session is not session:
            raise ProtocolError(Code.BAD_REQUEST, "this request id belongs to another client", message.request)
        have = message.body.get("have")
        if have is None and request.data == sender and request.id in self._requests:
            return True
        if message.request not in self._requests:
            self._requests[message.request] = self._remembered.take(message.request)
        request.replay(sender, have if type(have) is int and 0 <= have <= len(request.texts) else 0)
        self._deliver(request)
        return True

    def _admit(self, session: Session, asked: submission.Submission, request: bytes) -> None:
        """Raise `ProtocolError` for what cannot be served now."""
        if self.state == "draining":
            raise ProtocolError(Code.DRAINING, "the daemon is stopping; try: make chat", request)
        if self.state == "ready" and (adapters := self.fleet.first.adapters):
            try:
                resolve(adapters, asked.adapter)
            except AdapterError as fault:
                name = (asked.adapter or "").partition("@")[0]
                if name in self.administration.runs and all(adapter.name != name for adapter in adapters):
                    # An engine that was started again is about to load it; it knows best.
                    return
                names = [adapter.key for adapter in adapters]
                raise ProtocolError(Code.NO_ADAPTER, str(fault), request, adapters=names) from None
        waiting = self._waiting()
        own = [r for r in waiting if r.session is session]
        for have, most, whose in (
            (len(waiting), self._settings.queue, ""),
            (len(own), self._settings.share, " of yours"),
        ):
            if have >= most:
                after = self.figures.retry_after_ms(have)
                text = f"{have} requests{whose} wait already; try again in {after / 1e3:.1f} s"
                raise ProtocolError(Code.QUEUE_FULL, text, request, waiting=have, max=most, retry_after_ms=after)

    def _place(self, request: OpenRequest) -> None:
        """Give a request to an engine, if one is ready."""
        engine = self.fleet.choose(request.asked)
        if engine is None:
            return
        request.engine = engine
        request.num_starts += 1
        chosen = self.fleet.engines[engine]
        if not chosen.open:
            # It had nothing to say until now.
            chosen.last_heard = time.monotonic()
        chosen.open.add(request.id)
        body = {**request.asked.to_body(), "client": request.session.number}
        self._forward(engine, Message(Kind.SUBMIT, request.id, body))

    def _on_cancel(self, session: Session, request_id: bytes) -> None:
        request = self._requests.get(request_id)
        if request is not None and request.session is session:
            self._end(request, Code.CANCELLED, "cancelled", tokens=request.tokens)
        elif request is None and self._remembered.find(request_id) is None:
            # Control is the faster lane: the SUBMIT is still on its way.
            session.cancelled = [*session.cancelled, request_id][-MAX_EARLY_CANCELS:]

    # From the engine processes.

    def engine_starts(self, number: int, pid: int) -> None:
        """An engine process was started, for the first time or again."""
        self.fleet.engines[number] = EngineState(pid=pid)
        self.fleet.forget(number)

    def engine_died(self, number: int, why: str) -> None:
        """Its requests go to another engine if they have not said a word, else they end with an error."""
        engine = self.fleet.engines[number]
        engine.state = "down"
        for request in [r for r in self._requests.values() if r.engine == number and r.terminal is None]:
            request.engine, request.is_in_slot = None, False
            if request.tokens or request.num_starts > 1:
                self._end(request, Code.ENGINE, f"{why}; try again", tokens=request.tokens)
            else:
                self._place(request)
        engine.open.clear()
        engine.in_slots.clear()
        self.administration.engine_died(number, why)

    def on_engine(self, number: int, message: Message) -> None:
        """PROGRESS, READY, ADAPTERS, or news of a request."""
        engine = self.fleet.engines[number]
        engine.last_heard = time.monotonic()
        if message.kind is Kind.READY:
            engine.state, engine.info = "ready", message.body["info"]
            self.administration.engine_ready(number)
            self._now_ready()
        elif message.kind is Kind.PROGRESS and message.request == NO_REQUEST:
            if self.state == "loading":
                self._progress = message
                self._clients.tell(message)
        elif not self.administration.on_engine(number, message):
            self._on_answer(engine, message)

    def _now_ready(self) -> None:
        if self.state == "loading":
            self.state = "ready"
            for session in self._clients:
                self._welcome(session)
        for request in [r for r in self._requests.values() if r.engine is None and r.terminal is None]:
            self._place(request)

    def _on_answer(self, engine: EngineState, message: Message) -> None:
        if message.kind in (Kind.DONE, Kind.ERROR):
            engine.open.discard(message.request)
            engine.in_slots.discard(message.request)
        elif message.kind is Kind.PROGRESS:
            engine.in_slots.add(message.request)
        request = self._requests.get(message.request)
        if request is None or request.terminal is not None:
            # It ended here, while these words were on their way.
            return
        if message.kind is Kind.ACCEPTED:
            waiting = self._waiting()
            request.place = waiting.index(request) if request in waiting else 0
            body = {**message.body, "position": request.place, **dataclasses.asdict(request.asked.sampling)}
            request.accepted = request.accepted_due = Message(Kind.ACCEPTED, request.id, body)
            self._deliver(request)
        elif message.kind is Kind.PROGRESS:
            request.is_in_slot = True
            self._tell(request, message)
        elif message.kind is Kind.DELTA:
            self._on_words(request, message)
            self._deliver(request)
        elif message.kind is Kind.DONE:
            body = {**message.body, "digest": request.digest}
            self._close(request, Message(Kind.DONE, request.id, body), body["reason"])
        elif message.kind is Kind.ERROR:
            self._close(request, message, message.body["code"])

    def _on_words(self, request: OpenRequest, message: Message) -> None:
        now, before = time.monotonic(), request.last_delta
        number = message.body["tokens"] - request.tokens
        self.figures.token(number, now - (before or request.arrived), is_first=before is None)
        request.last_delta, request.tokens = now, message.body["tokens"]
        request.pending += message.body["text"]
        request.ids += message.body.get("ids", ())

    def _deliver(self, request: OpenRequest) -> None:
        """Send what may be sent: ACCEPTED, deltas on credit, and the rest, which needs none, with the last message."""
        if self._requests.get(request.id) is not request:
            # It is over, and its client knows.
            return
        if request.session.gone_at is not None or request.lost_at is not None:
            return
        if request.accepted_due is not None:
            if not self._is_sent(request, request.accepted_due):
                return
            request.accepted_due = None
        if (request.pending or request.ids) and (request.credit > 0 or request.terminal):
            body = {"n": len(request.texts), "text": request.pending, "tokens": request.tokens}
            body |= {"ids": request.ids} if request.asked.wants_ids else {}
            if not self._is_sent(request, Message(Kind.DELTA, request.id, body)):
                return
            request.texts.append(request.pending)
            request.sent_ids.append(request.ids)
            request.credit -= 1
            request.pending, request.ids = "", []
        if request.terminal and self._is_sent(request, request.terminal):
            self._retire(request)

    def _tell(self, request: OpenRequest, progress: Message) -> bool:
        """Send news that the next will replace; whether they went out."""
        return request.accepted_due is None and self._send(Lane.DATA, request.data, progress) is Sent.OK

    def _is_sent(self, request: OpenRequest, message: Message) -> bool:
        sent = self._send(Lane.DATA, request.data, message)
        if sent is Sent.GONE:
            request.lost_at = request.lost_at or time.monotonic()
            request.session.gone_at = request.session.gone_at or time.monotonic()
        return sent is Sent.OK

    # Endings.

    def _end(self, request: OpenRequest, code: Code, text: str, **detail: Any) -> None:
        """The client is told at once; the engine, perhaps in the middle of a chunk, follows when it can."""
        if request.terminal is not None:
            return
        if request.engine is not None:
            self._forward(request.engine, Message(Kind.CANCEL, request.id))
        if code is Code.CANCELLED:
            request.pending, request.ids = "", []
        self._close(request, error(request.id, code, text, **detail), code)

    def _close(self, request: OpenRequest, terminal: Message, how: str) -> None:
        request.terminal = terminal
        self.figures.ended(how)
        self._log("request over", id=request.id.hex(), how=how, tokens=request.tokens, **terminal.body.get("usage", {}))
        if terminal.kind is Kind.DONE and request.engine is not None:
            self.fleet.remember(request.asked, request.text, request.engine)
        self._deliver(request)

    def _retire(self, request: OpenRequest) -> None:
        del self._requests[request.id]
        # Its answer may be asked for again; the conversation, megabytes perhaps, may go.
        request.asked = dataclasses.replace(request.asked, messages=[])
        self._remembered.add(request)

    def _abandon(self, session: Session) -> None:
        """Its client has gone: nobody wants these answers."""
        for request in [r for r in self._requests.values() if r.session is session]:
            self._give_up(request)

    def _give_up(self, request: OpenRequest) -> None:
        self._end(request, Code.CANCELLED, "cancelled: the client went away", tokens=request.tokens)
        if request.id in self._requests:
            self._retire(request)

    def tick(self) -> None:
        """Ten times a second: deadlines, slow readers, places in the queue, and clients that went silent."""
        now = time.monotonic()
        for request in list(self._requests.values()):
            limit = request.asked.deadline_ms
            if limit is not None and (now - request.arrived) * 1e3 > limit:
                text = f"not done after {limit} ms; try a longer deadline"
                self._end(request, Code.DEADLINE, text, deadline_ms=limit, tokens=request.tokens)
            self._deliver(request)
            if request.lost_at is not None and now - request.lost_at > SILENCE_SECONDS:
                self._give_up(request)
        for session in {r.session for r in self._requests.values()}:
            is_silent = now - session.last_seen > SILENCE_SECONDS
            grace = 0.0 if self.state == "draining" else GRACE_SECONDS
            if is_silent or (session.gone_at is not None and now - session.gone_at > grace):
                session.gone_at = session.gone_at or now
                self._abandon(session)
        if now - self._places_told > PLACE_SECONDS:
            self._places_told = now
            self._tell_places()
        self._clients.tick(Message(Kind.PONG, body={"epoch": self.epoch}))
        self._remembered.tidy()
        self._outbox.tick()

    def _tell_places(self) -> None:
        waiting = self._waiting()
        for place, request in enumerate(waiting):
            if request.accepted is not None and place != request.place and request.session.gone_at is None:
                body = {"stage": "queued", "done": place, "total": len(waiting)}
                if self._tell(request, Message(Kind.PROGRESS, request.id, body)):
                    request.place = place

    def drain(self) -> None:
        """Take no more requests."""
        self.state = "draining"

    def end(self, code: Code, text: str) -> None:
        """End the open requests, each with an ERROR; sessions without one hear it on control."""
        self.drain()
        self._clients.tell(error(NO_REQUEST, code, text))
        for request in list(self._requests.values()):
            self._end(request, code, text, tokens=request.tokens)

    # Figures.

    def _waiting(self) -> list[OpenRequest]:
        """Requests that have no slot, in the order of their arrival."""
        return [r for r in self._requests.values() if r.terminal is None and not r.is_in_slot]

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return sum(request.terminal is None for request in self._requests.values())

    def hung(self) -> list[int]:
        """Engines that have work and have said nothing for too long."""
        now = time.monotonic()
        return [
            number
            for number, engine in self.fleet.ready.items()
            if engine.open and now - engine.last_heard > self._settings.hung_s
        ]

    def status(self) -> dict[str, Any]:
        """The body of the STATUS answer."""
        engines = self.fleet.engines
        return {
            "state": self.state,
            "epoch": self.epoch,
            "pid": os.getpid(),
            "rss_bytes": self._rss_bytes(os.getpid()),
            "info": self.info,
            "adapters": [adapter.key for adapter in self.fleet.first.adapters],
            "busy_slots": sum(len(engine.in_slots) for engine in engines.values()),
            "num_slots": sum(engine.info["num_slots"] for engine in self.fleet.ready.values()),
            "waiting": len(self._waiting()),
            "clients": len(list(self._clients)),
            "engines": [
                {
                    "pid": e.pid,
                    "state": e.state,
                    "busy_slots": len(e.in_slots),
                    "waiting": len(e.open - e.in_slots),
                    "rss_bytes": self._rss_bytes(e.pid),
                }
                for _, e in sorted(engines.items())
            ],
            **self.figures.summary(),
        }
