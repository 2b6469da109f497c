"""What the daemon has sent to an engine: a CANCEL counts at once, all else in its order and for a short time each turn."""

import time
from collections import deque

import zmq

from serve.protocol import MAX_MESSAGE_BYTES, Kind, decode
from serve.worker import Worker

# Answers wait about so long at most, in seconds, for what is asked between two of their tokens.
TURN_SECONDS = 0.02


class Inbox:
    """Hands the messages of a link to a worker, between its turns.

    They wait as they came: in one piece they are small, and what a CANCEL takes back is never read.
    """

    def __init__(self, link: zmq.Socket[bytes], worker: Worker) -> None:
        self._link, self._worker = link, worker
        self._waiting: deque[list[bytes]] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether the daemon has said nothing that was not seen to."""
        return not self._waiting and not self._link.poll(0)

    def take(self) -> None:
        """See to what there is, as far as the time allows, but to one message at least; an idle worker waits for it."""
        while (self._worker.is_idle and not self._waiting) or self._link.poll(0):
            self._put(self._link.recv_multipart())
        end = time.monotonic() + TURN_SECONDS
        while self._waiting:
            self._see_to(self._waiting.popleft())
            if time.monotonic() >= end:
                return

    def _put(self, frames: list[bytes]) -> None:
        _, kind, request, _ = frames
        if kind == Kind.CANCEL.value:
            its_submit = [Kind.SUBMIT.value, request]
            self._waiting = deque(waiting for waiting in self._waiting if waiting[1:3] != its_submit)
            self._see_to(frames)
        else:
            self._waiting.append(frames)

    def _see_to(self, frames: list[bytes]) -> None:
        # What the daemon adds to a conversation at the very limit of the size is not held against it.
        self._worker.receive(decode(frames, 2 * MAX_MESSAGE_BYTES))
