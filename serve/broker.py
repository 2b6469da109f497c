"""Between the clients and the engines: what clients say, what is refused, who is still alive.

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
from serve.admission import check_adapter, check_queue
from serve.answers import Answers
from serve.clients import Clients
from serve.dispatch import Dispatch
from serve.figures import Figures
from serve.fleet import Fleet
from serve.limits import limits
from serve.open_requests import Lane, OpenRequest, Sent, Session
from serve.outbox import Outbox
from serve.protocol import (
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
        self._send, self._settings, self._rss_bytes = send, settings, rss_bytes
        self.epoch = secrets.token_hex(8)
        self.state = "loading"
        self.figures = Figures()
        self.fleet = Fleet()
        self._progress: Message | None = None
        self._outbox = Outbox(send)
        self._answers = Answers(send, forward, self.fleet, self.figures, log)
        self._clients = Clients(send, self._answers.abandon)
        self.administration = Administration(self._outbox.send, forward, self.fleet, admin, self.status, on_leave, log)
        self.dispatch = Dispatch(
            forward, self.fleet, self._answers, self.administration, self._on_ready, self._on_loading
        )

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
            request = self._answers.open.get(message.request)
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
            request = self._answers.open.get(message.request)
            if request is not None and request.data == sender:
                request.session.spoke()
                self._answers.grant(request, message.body["count"])
        else:
            refusal = error(message.request, Code.UNSUPPORTED, f"{message.kind.name} does not belong on data")
            self._outbox.send(Lane.DATA, sender, refusal)

    def refuse(self, lane: Lane, sender: bytes, fault: ProtocolError) -> None:
        """Answer frames that are no message of ours, or a message at which we failed."""
        # An open request keeps its one ERROR or DONE for its own end.
        request = self._answers.open.get(fault.request)
        if request is None:
            self._outbox.send(lane, sender, error(fault.request, fault.code, str(fault)))
        elif fault.code is Code.INTERNAL and request.data == sender:
            # Nobody knows how far we came with it: it shall not wait for ever.
            self._answers.end(request, fault.code, str(fault), tokens=request.tokens)

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
        if message.request == NO_REQUEST:
            raise ProtocolError(Code.BAD_REQUEST, "this id belongs to no request; try a random one", message.request)
        if self._is_known(sender, session, message):
            return
        asked = submission.parse(message.body, message.request)
        if asked.sampling.seed is None:
            asked = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, seed=secrets.randbits(62)))
        if self.state == "draining":
            raise ProtocolError(Code.DRAINING, "the daemon is stopping; try: make chat", message.request)
        check_adapter(self.fleet, self.administration.runs, asked, message.request)
        check_queue(self._answers, self.fleet, self._settings, self.figures, session, message.request)
        request = self._answers.open[message.request] = OpenRequest(message.request, sender, session, asked)
        if message.request in session.cancelled:
            self._answers.end(request, Code.CANCELLED, "cancelled", tokens=0)
        else:
            self.dispatch.place(request)
            request.pack()

    def _is_known(self, sender: bytes, session: Session, message: Message) -> bool:
        """A SUBMIT that was seen before never runs again; its client gets what it does not have yet."""
        if self._outbox.holds(Lane.DATA, sender, message.request):
            return True
        request = self._answers.find(message.request)
        if request is None:
            return False
        if request.session is not session:
            raise ProtocolError(Code.BAD_REQUEST, "this request id belongs to another client", message.request)
        self._answers.again(request, sender, message.body.get("have"))
        return True

    def _on_cancel(self, session: Session, request_id: bytes) -> None:
        request = self._answers.find(request_id)
        if request is not None and request.session is session:
            self._answers.end(request, Code.CANCELLED, "cancelled", tokens=request.tokens)
        elif request is None:
            # Control is the faster lane: the SUBMIT is still on its way.
            session.cancelled = [*session.cancelled, request_id][-MAX_EARLY_CANCELS:]

    # From the engines.

    def _on_ready(self) -> None:
        if self.state == "loading":
            self.state = "ready"
            for session in self._clients:
                self._welcome(session)

    def _on_loading(self, progress: Message) -> None:
        if self.state == "loading":
            self._progress = progress
            self._clients.tell(progress)

    # Now and then.

    def tick(self) -> None:
        """Ten times a second: what is due to answers, and clients that went silent."""
        self._answers.tick()
        now = time.monotonic()
        for session in {request.session for request in self._answers.open.values()}:
            is_silent = now - session.last_seen > SILENCE_SECONDS
            grace = 0.0 if self.state == "draining" else GRACE_SECONDS
            if is_silent or (session.gone_at is not None and now - session.gone_at > grace):
                session.gone_at = session.gone_at or now
                self._answers.abandon(session)
        self._clients.tick(Message(Kind.PONG, body={"epoch": self.epoch}))
        self._outbox.tick()

    def drain(self) -> None:
        """Take no more requests."""
        self.state = "draining"

    def end(self, code: Code, text: str) -> None:
        """End the open requests, each with an ERROR; sessions without one hear it on control."""
        self.drain()
        self._clients.tell(error(NO_REQUEST, code, text))
        for request in list(self._answers.open.values()):
            self._answers.end(request, code, text, tokens=request.tokens)

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return self._answers.num_running

    def hung(self) -> list[int]:
        """Engines that have work and have said nothing for too long."""
        return self.dispatch.hung(self._settings.hung_s)

    def status(self) -> dict[str, Any]:
        """The body of the STATUS answer."""
        return {
            "state": self.state,
            "epoch": self.epoch,
            "pid": os.getpid(),
            "rss_bytes": self._rss_bytes(os.getpid()),
            "info": self.info,
            "waiting": len(self._answers.waiting),
            "clients": len(list(self._clients)),
            **self.dispatch.status(self._rss_bytes),
            **self.figures.summary(),
        }
