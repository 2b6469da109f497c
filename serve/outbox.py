"""Answers that must not be lost: what meets a full connection is kept and sent later, in order."""

from collections import deque
from collections.abc import Callable

from serve.open_requests import Lane, Sent
from serve.protocol import Message

# The newest answers to a client that reads none are kept; of one that asks so much and never reads, the older ones are not.
MAX_KEPT = 64


class Outbox:
    """Around `send`, for answers to which no request belongs that would keep them."""

    def __init__(self, send: Callable[[Lane, bytes, Message], Sent]) -> None:
        self._send = send
        self._kept: dict[tuple[Lane, bytes], deque[Message]] = {}

    def send(self, lane: Lane, receiver: bytes, message: Message) -> Sent:
        """Send now or, where the connection is full, keep it for `tick`."""
        kept = self._kept.get((lane, receiver))
        sent = Sent.FULL if kept else self._send(lane, receiver, message)
        if sent is Sent.FULL:
            self._kept.setdefault((lane, receiver), deque(maxlen=MAX_KEPT)).append(message)
        return sent

    def holds(self, lane: Lane, receiver: bytes, request: bytes) -> bool:
        """Whether an answer to this request is kept."""
        return any(message.request == request for message in self._kept.get((lane, receiver), ()))

    def tick(self) -> None:
        """Send what has found no room before; what was for somebody who has gone is dropped."""
        for (lane, receiver), kept in list(self._kept.items()):
            while kept and self._send(lane, receiver, kept[0]) is not Sent.FULL:
                kept.popleft()
            if not kept:
                del self._kept[lane, receiver]
