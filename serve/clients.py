"""The clients of a daemon: who said HELLO, who came back, who is gone."""

import time
from collections.abc import Callable, Iterator

from serve.open_requests import Lane, Sent, Session
from serve.protocol import VERSION, Code, Message, error

# How often a client that asks for nothing is written to, to learn whether it is still there.
PROBE_SECONDS = 10.0
# At most so many at a time: many clients that came together are not probed together.
MAX_PROBES = 100
# One that has gone is remembered for so long: it may come back with its session.
FORGET_SECONDS = 300.0
MAX_SESSIONS = 4096


class Clients:
    """`on_forget` hears of a client that is gone for good, before it is forgotten."""

    def __init__(self, send: Callable[[Lane, bytes, Message], Sent], on_forget: Callable[[Session], None]) -> None:
        self._send, self._on_forget = send, on_forget
        self._by_control: dict[bytes, Session] = {}
        self._by_secret: dict[bytes, Session] = {}
        self._number = 0

    def __iter__(self) -> Iterator[Session]:
        """Those that are there."""
        return iter([session for session in self._by_control.values() if session.gone_at is None])

    def speaking(self, control: bytes) -> Session | None:
        """Whose routing id on control this is."""
        return self._by_control.get(control)

    def holding(self, secret: object) -> Session | None:
        """Whose secret this is."""
        return self._by_secret.get(secret) if isinstance(secret, bytes) else None

    def greet(self, sender: bytes, message: Message) -> Session | None:
        """The session of a HELLO, an earlier one if it names it; None, with an answer, if no version fits."""
        versions = message.body["proto"]
        if VERSION not in versions:
            text = f"this daemon speaks version {VERSION} of the protocol; try a client of that version"
            self._send(Lane.CONTROL, sender, error(message.request, Code.UNSUPPORTED, text))
            return None
        before = self._by_control.get(sender)
        session = self.holding(message.body.get("session")) or before
        if session is None:
            self._number += 1
            session = Session(sender, self._number)
            self._by_secret[session.secret] = session
        if before is not None and before is not session:
            self._forget(before)
        self._by_control.pop(session.control, None)
        session.control = sender
        self._by_control[sender] = session
        session.seen()
        if len(self._by_control) > MAX_SESSIONS:
            self._make_room(session)
        return session

    def tell(self, message: Message) -> None:
        """Say the same to all of them, on control."""
        for session in self:
            self._send(Lane.CONTROL, session.control, message)

    def tick(self, pong: Message) -> None:
        """Look for those that have gone."""
        now, num_probes = time.monotonic(), 0
        for session in list(self._by_control.values()):
            if session.gone_at is not None and now - session.gone_at > FORGET_SECONDS:
                self._forget(session)
            elif session.gone_at is None and now - session.last_probe > PROBE_SECONDS and num_probes < MAX_PROBES:
                session.last_probe = now
                num_probes += 1
                if self._send(Lane.CONTROL, session.control, pong) is Sent.GONE:
                    session.gone_at = now

    def _make_room(self, newcomer: Session) -> None:
        """Forget the older half of those that have gone or only said HELLO, else the one that was silent for longest."""
        others = [session for session in self._by_control.values() if session is not newcomer]
        idle = [session for session in others if session.gone_at is not None or not session.has_spoken]
        # Half of them: in a flood, not every HELLO shall look through all sessions.
        idle.sort(key=lambda session: (session.gone_at is None, session.last_seen))
        for session in idle[: len(idle) // 2 + 1] or [min(others, key=lambda session: session.last_seen)]:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        self._on_forget(session)
        self._by_control.pop(session.control, None)
        self._by_secret.pop(session.secret, None)
