"""An attacker of a daemon: its sockets, the secrets and ids it knows, and its seeded draws."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq

from bench.daemon import Served
from serve.protocol import MAGIC, VERSION

DATA, CONTROL = "data", "control"


@dataclass
class Draw:
    """The seeded draws of attacks. `sessions` are the attacker's own secrets, `ids` request ids that it has used before."""

    random: random.Random
    sessions: list[bytes] = field(default_factory=lambda: [bytes(16)])
    ids: list[bytes] = field(default_factory=lambda: [bytes(16)])
    # A message near the limit of the size costs both sides so much that only few may be one.
    num_big: int = 0

    def noise(self, most: int) -> bytes:
        """Up to so many random bytes."""
        return self.random.randbytes(self.random.randint(0, most))

    def id(self) -> bytes:
        """A new request id."""
        self.ids = [*self.ids[-200:], self.random.randbytes(16)]
        return self.ids[-1]

    def body(self, text: str = "x", **more: Any) -> dict[str, Any]:
        """A good SUBMIT's body, but for what is in `more`."""
        messages = [{"role": "user", "content": text}]
        return {"session": self.random.choice(self.sessions), "messages": messages, "max_tokens": 3, **more}

    def is_big(self) -> bool:
        """True for the few that may be near the limit of the size."""
        self.num_big += 1
        return self.num_big % 50 == 0


def frames(kind: bytes, request: bytes, body: Any) -> list[bytes]:
    """The frames that `serve.protocol.encode` makes, of anything."""
    return [MAGIC, kind, request, body if isinstance(body, bytes) else msgpack.packb(body)]


class Pair:
    """Two DEALERs, without any manners."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", served: Served) -> None:
        self.sockets = {}
        for lane, endpoint in ((DATA, served.record.data), (CONTROL, served.record.control)):
            self.sockets[lane] = context.socket(zmq.DEALER)
            self.sockets[lane].setsockopt(zmq.LINGER, 0)
            self.sockets[lane].connect(endpoint)
        self.hello()

    def hello(self) -> None:
        """Get a session; the answer is seen later."""
        self.send(CONTROL, frames(b"H", bytes(16), {"proto": [VERSION]}))

    def send(self, lane: str, message: list[bytes]) -> bool:
        """False where the daemon takes nothing at the moment."""
        try:
            self.sockets[lane].send_multipart(message, flags=zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def received(self) -> Iterator[list[bytes]]:
        """The messages that have come."""
        for own in self.sockets.values():
            with contextlib.suppress(zmq.Again):
                while True:
                    yield own.recv_multipart(flags=zmq.DONTWAIT)

    def close(self) -> None:
        """Vanish."""
        for own in self.sockets.values():
            own.close(0)
