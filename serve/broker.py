"""Between the clients and the engine process: sessions, open requests, credit, and who is still alive.

No sockets here: `send` carries a message to a client and says what became of it, `forward` carries one to the engine.
"""

import secrets
import time
from collections.abc import Callable
from typing import Any

from serve import submission
from serve.open_requests import Lane, OpenRequest, Sent, Session
from serve.protocol import (
    CREDIT_WINDOW,
    MAX_MESSAGE_BYTES,
    NO_REQUEST,
    PING_SECONDS,
    SILENCE_SECONDS,
    VERSION,
    Code,
    Kind,
    Message,
    ProtocolError,
    error,
)

MAX_WAITING = 64
RETRY_AFTER_MS = 1000
# How often a client that asks for nothing is written to, to learn whether it is still there.
PROBE_SECONDS = 60.0


class Broker:
    """Every handler runs to its end before the next message is read, so the state is always whole."""

    def __init__(self, send: Callable[[Lane, bytes, Message], Sent], forward: Callable[[Message], None]) -> None:
        self._send = send
        self._forward = forward
        self.epoch = secrets.token_hex(8)
        self.state = "loading"
        self.info: dict[str, Any] = {}
        self._progress: Message | None = None
        self._sessions: dict[bytes, Session] = {}
        self._requests: dict[bytes, OpenRequest] = {}
        # Requests that sit in a slot of the engine, also ones whose client was told long ago that they are over.
        self._in_slots: set[bytes] = set()

    # From clients.

    def on_control(self, sender: bytes, message: Message) -> None:
        """HELLO, CANCEL, PING or STATUS."""
        session = self._sessions.get(sender)
        if message.kind is Kind.HELLO:
            self._greet(sender, message)
            return
        if session is None:
            self._send(Lane.CONTROL, sender, error(message.request, Code.BAD_REQUEST, "say HELLO first"))
            return
        session.last_seen = time.monotonic()
        if message.kind is Kind.PING:
            self._send(Lane.CONTROL, sender, Message(Kind.PONG, message.request, {"epoch": self.epoch}))
        elif message.kind is Kind.STATUS:
            self._send(Lane.CONTROL, sender, Message(Kind.STATUS, message.request, self.status()))
        elif message.kind is Kind.CANCEL:
            request = self._requests.get(message.request)
            if request is not None and request.session is session:
                self._cancel(request)
        else:
            refusal = error(message.request, Code.UNSUPPORTED, f"{message.kind.name} does not belong on control")
            self._send(Lane.CONTROL, sender, refusal)

    def on_data(self, sender: bytes, message: Message) -> None:
        """SUBMIT or CREDIT."""
        if message.kind is Kind.SUBMIT:
            try:
                self._submit(sender, message)
            except ProtocolError as fault:
                self._send(Lane.DATA, sender, error(fault.request, fault.code, str(fault)))
        elif message.kind is Kind.CREDIT:
            request = self._requests.get(message.request)
            if request is not None and request.data == sender:
                request.session.last_seen = time.monotonic()
                request.credit = min(request.credit + max(message.body["count"], 0), CREDIT_WINDOW)
                self._deliver(request)
        else:
            refusal = error(message.request, Code.UNSUPPORTED, f"{message.kind.name} does not belong on data")
            self._send(Lane.DATA, sender, refusal)

    def refuse(self, lane: Lane, sender: bytes, fault: ProtocolError) -> None:
        """Answer frames that are no message of ours."""
        # An open request keeps its one ERROR or DONE for its own end.
        if fault.request not in self._requests:
            self._send(lane, sender, error(fault.request, fault.code, str(fault)))

    def _greet(self, sender: bytes, message: Message) -> None:
        versions = message.body["proto"]
        if VERSION not in versions:
            text = f"this daemon speaks version {VERSION} of the protocol, not {versions!r}"
            self._send(Lane.CONTROL, sender, error(message.request, Code.UNSUPPORTED, text))
            return
        session = self._sessions.setdefault(sender, Session(sender))
        self._welcome(session)
        if self.state == "loading" and self._progress is not None:
            self._send(Lane.CONTROL, sender, self._progress)

    def _welcome(self, session: Session) -> None:
        limits = {
            "queue": MAX_WAITING,
            "credit": CREDIT_WINDOW,
            "message_bytes": MAX_MESSAGE_BYTES,
            "ping_seconds": PING_SECONDS,
            "silence_seconds": SILENCE_SECONDS,
        }
        body = {"proto": VERSION, "epoch": self.epoch, "session": session.secret, "state": self.state}
        self._send(
            Lane.CONTROL, session.control, Message(Kind.WELCOME, body={**body, "info": self.info, "limits": limits})
        )

    def _submit(self, sender: bytes, message: Message) -> None:
        secret = message.body.get("session")
        session = next((s for s in self._sessions.values() if s.secret == secret), None)
        if session is None:
            raise ProtocolError(Code.BAD_REQUEST, "say HELLO on control and give its session here", message.request)
        session.last_seen = time.monotonic()
        if message.request in self._requests:
            # A repeated SUBMIT never runs twice; the answer is under way.
            return
        asked = submission.parse(message.body, message.request)
        if self.state == "draining":
            raise ProtocolError(Code.DRAINING, "the daemon is stopping; try: make chat", message.request)
        waiting = self.num_waiting
        if waiting >= MAX_WAITING:
            text = f"{waiting} requests wait already; try again in a moment"
            self._send(Lane.DATA, sender, error(message.request, Code.QUEUE_FULL, text, retry_after_ms=RETRY_AFTER_MS))
            return
        request = self._requests[message.request] = OpenRequest(message.request, sender, session)
        self._forward(Message(Kind.SUBMIT, request.id, asked.to_body()))
        self._send(Lane.DATA, sender, Message(Kind.ACCEPTED, request.id, {"position": waiting}))

    # From the engine process.

    def on_engine(self, message: Message) -> None:
        """PROGRESS, READY, or news of a request."""
        if message.kind is Kind.PROGRESS:
            self._progress = message
            self._tell_all(message)
        elif message.kind is Kind.READY:
            self.state, self.info = "ready", message.body["info"]
            for session in list(self._sessions.values()):
                self._welcome(session)
        else:
            self._on_answer(message)

    def _on_answer(self, message: Message) -> None:
        if message.kind is Kind.ACCEPTED:
            self._in_slots.add(message.request)
        elif message.kind is not Kind.DELTA:
            self._in_slots.discard(message.request)
        request = self._requests.get(message.request)
        if request is None:
            # Cancelled here, while these words were on their way.
            return
        if message.kind is Kind.DELTA:
            request.pending += message.body["text"]
            request.tokens = message.body["tokens"]
        elif message.kind in (Kind.DONE, Kind.ERROR):
            request.terminal = message
        self._deliver(request)

    def _deliver(self, request: OpenRequest) -> None:
        """Send what may be sent: deltas on credit, and the rest, which needs none, together with the last message."""
        while request.pending and (request.credit > 0 or request.terminal):
            body = {"n": request.num_deltas, "text": request.pending, "tokens": request.tokens}
            if not self._is_sent(request, Message(Kind.DELTA, request.id, body)):
                return
            request.num_deltas += 1
            request.credit -= 1
            request.pending = ""
        if request.terminal and self._is_sent(request, request.terminal):
            del self._requests[request.id]

    def _is_sent(self, request: OpenRequest, message: Message) -> bool:
        sent = self._send(Lane.DATA, request.data, message)
        if sent is Sent.GONE:
            self._forget(request.session)
        return sent is Sent.OK

    # Endings.

    def _cancel(self, request: OpenRequest) -> None:
        # The client is told at once; the engine, perhaps in the middle of a long prompt, follows when it can.
        if request.terminal is None:
            self._forward(Message(Kind.CANCEL, request.id))
        request.pending = ""
        request.terminal = error(request.id, Code.CANCELLED, "cancelled")
        self._deliver(request)

    def _forget(self, session: Session) -> None:
        """A client has gone: nobody wants its answers."""
        self._sessions.pop(session.control, None)
        for request in [r for r in self._requests.values() if r.session is session]:
            self._forward(Message(Kind.CANCEL, request.id))
            del self._requests[request.id]

    def tick(self) -> None:
        """Twice a second: retry what a slow reader could not take, and look for clients that went silent."""
        now = time.monotonic()
        for request in list(self._requests.values()):
            self._deliver(request)
        for session in {r.session.control: r.session for r in self._requests.values()}.values():
            if now - session.last_seen > SILENCE_SECONDS:
                self._forget(session)
        for session in [s for s in self._sessions.values() if now - s.last_probe > PROBE_SECONDS]:
            session.last_probe = now
            if self._send(Lane.CONTROL, session.control, Message(Kind.PONG, body={"epoch": self.epoch})) is Sent.GONE:
                self._forget(session)

    def end(self, code: Code, text: str) -> None:
        """Take no more requests and end the open ones, each with an ERROR; sessions without one hear it on control."""
        self.state = "draining"
        self._tell_all(error(NO_REQUEST, code, text))
        for request in list(self._requests.values()):
            request.terminal = request.terminal or error(request.id, code, text)
            self._deliver(request)

    def _tell_all(self, message: Message) -> None:
        for control in list(self._sessions):
            self._send(Lane.CONTROL, control, message)

    # Figures.

    @property
    def num_waiting(self) -> int:
        """Open requests without a slot."""
        return len(self._unfinished() - self._in_slots)

    def _unfinished(self) -> set[bytes]:
        return {request.id for request in self._requests.values() if request.terminal is None}

    def status(self) -> dict[str, Any]:
        """The body of the STATUS answer."""
        return {
            "state": self.state,
            "epoch": self.epoch,
            "info": self.info,
            "busy_slots": len(self._in_slots),
            "waiting": self.num_waiting,
            "clients": len(self._sessions),
        }
