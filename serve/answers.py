"""The requests that are open and the answers to them: words on credit, exactly one ending each, and all of it once more."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from serve.figures import Figures
from serve.fleet import Fleet
from serve.open_requests import Lane, OpenRequest, Remembered, Sent, Session
from serve.protocol import CREDIT_WINDOW, SILENCE_SECONDS, Code, Kind, Message, error

PLACE_SECONDS = 0.5


class Answers:
    """`open` are the requests without an ending that their client knows, by id, in the order of their arrival."""

    def __init__(
        self,
        send: Callable[[Lane, bytes, Message], Sent],
        forward: Callable[[int, Message], None],
        fleet: Fleet,
        figures: Figures,
        log: Callable[..., None],
    ) -> None:
        self._send, self._forward, self._fleet, self._figures, self._log = send, forward, fleet, figures, log
        self.open: dict[bytes, OpenRequest] = {}
        self._remembered = Remembered()
        self._places_told = 0.0

    @property
    def waiting(self) -> list[OpenRequest]:
        """Requests that have no slot."""
        return [r for r in self.open.values() if r.terminal is None and not r.is_in_slot]

    @property
    def num_running(self) -> int:
        """Requests that are not over."""
        return sum(request.terminal is None for request in self.open.values())

    def find(self, request_id: bytes) -> OpenRequest | None:
        """A request that is open or remembered."""
        return self.open.get(request_id) or self._remembered.find(request_id)

    # To the client.

    def again(self, request: OpenRequest, data: bytes, have: object) -> None:
        """Its client asked once more, as `data`, and has so many deltas: it gets what it does not have yet."""
        if have is None and request.data == data and request.id in self.open:
            return
        if request.id not in self.open:
            self.open[request.id] = self._remembered.take(request.id)
        request.replay(data, have if type(have) is int and 0 <= have <= len(request.texts) else 0)
        self.deliver(request)

    def grant(self, request: OpenRequest, count: int) -> None:
        """So many more deltas are welcome."""
        request.credit = min(request.credit + max(count, 0), CREDIT_WINDOW)
        self.deliver(request)

    def deliver(self, request: OpenRequest) -> None:
        """Send what may be sent: ACCEPTED, deltas on credit, and the rest, which needs none, with the last message."""
        if self.open.get(request.id) is not request:
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
            request.sent_ids += [request.ids] if request.asked.wants_ids else []
            request.credit -= 1
            request.pending, request.ids = "", []
        if request.terminal and self._is_sent(request, request.terminal):
            self._retire(request)

    def _is_sent(self, request: OpenRequest, message: Message) -> bool:
        sent = self._send(Lane.DATA, request.data, message)
        if sent is Sent.GONE:
            request.lost_at = request.lost_at or time.monotonic()
            request.session.gone_at = request.session.gone_at or time.monotonic()
        return sent is Sent.OK

    def _tell(self, request: OpenRequest, progress: Message) -> bool:
        """Send news that the next will replace; whether they went out."""
        return request.accepted_due is None and self._send(Lane.DATA, request.data, progress) is Sent.OK

    # From the engine.

    def on_engine(self, message: Message) -> None:
        """What an engine says of a request."""
        request = self.open.get(message.request)
        if request is None or request.terminal is not None:
            # It ended here, while these words were on their way.
            return
        if message.kind is Kind.ACCEPTED:
            waiting = self.waiting
            request.place = waiting.index(request) if request in waiting else 0
            body = {**message.body, "position": request.place, **asdict(request.asked.sampling)}
            request.accepted = request.accepted_due = Message(Kind.ACCEPTED, request.id, body)
            self.deliver(request)
        elif message.kind is Kind.PROGRESS:
            request.is_in_slot = True
            self._tell(request, message)
        elif message.kind is Kind.DELTA:
            self._on_words(request, message)
            self.deliver(request)
        elif message.kind is Kind.DONE:
            body = {**message.body, "digest": request.digest}
            self._close(request, Message(Kind.DONE, request.id, body), body["reason"])
        elif message.kind is Kind.ERROR:
            self._close(request, message, message.body["code"])

    def _on_words(self, request: OpenRequest, message: Message) -> None:
        now, before = time.monotonic(), request.last_delta
        number = message.body["tokens"] - request.tokens
        self._figures.token(number, now - (before or request.arrived), is_first=before is None)
        request.last_delta, request.tokens = now, message.body["tokens"]
        request.pending += message.body["text"]
        request.ids += message.body.get("ids", ())

    # Endings.

    def end(self, request: OpenRequest, code: Code, text: str, **detail: Any) -> None:
        """The client is told at once; the engine, perhaps in the middle of a chunk, follows when it can."""
        if request.terminal is not None:
            return
        if request.engine is not None:
            self._forward(request.engine, Message(Kind.CANCEL, request.id))
            if not request.is_in_slot:
                self._fleet.engines[request.engine].leaving[request.id] = request.session.number
        if code is Code.CANCELLED:
            request.pending, request.ids = "", []
        self._close(request, error(request.id, code, text, **detail), code)

    def abandon(self, session: Session) -> None:
        """Its client has gone: nobody wants these answers."""
        for request in [r for r in self.open.values() if r.session is session]:
            self._give_up(request)

    def _close(self, request: OpenRequest, terminal: Message, how: str) -> None:
        request.terminal = terminal
        self._figures.ended(how)
        self._log("request over", id=request.id.hex(), how=how, tokens=request.tokens, **terminal.body.get("usage", {}))
        if terminal.kind is Kind.DONE and request.engine is not None and len(self._fleet.engines) > 1:
            self._fleet.remember(request.whole(), request.text, request.engine)
        # Its answer may be asked for again; the conversation, megabytes perhaps, may go.
        request.asked, request.packed = replace(request.asked, messages=[]), b""
        self.deliver(request)

    def _retire(self, request: OpenRequest) -> None:
        del self.open[request.id]
        self._remembered.add(request)

    def _give_up(self, request: OpenRequest) -> None:
        self.end(request, Code.CANCELLED, "cancelled: the client went away", tokens=request.tokens)
        if request.id in self.open:
            self._retire(request)

    # Now and then.

    def tick(self) -> None:
        """Deadlines, slow readers, requests whose connection is gone, places in the queue."""
        now = time.monotonic()
        for request in list(self.open.values()):
            limit = request.asked.deadline_ms
            if limit is not None and (now - request.arrived) * 1e3 > limit:
                text = f"not done after {limit} ms; try a longer deadline"
                self.end(request, Code.DEADLINE, text, deadline_ms=limit, tokens=request.tokens)
            self.deliver(request)
            if request.lost_at is not None and now - request.lost_at > SILENCE_SECONDS:
                self._give_up(request)
        if now - self._places_told > PLACE_SECONDS:
            self._places_told = now
            self._tell_places()
        self._remembered.tidy()

    def _tell_places(self) -> None:
        waiting = self.waiting
        for place, request in enumerate(waiting):
            if request.accepted is not None and place != request.place and request.session.gone_at is None:
                body = {"stage": "queued", "done": place, "total": len(waiting)}
                if self._tell(request, Message(Kind.PROGRESS, request.id, body)):
                    request.place = place
