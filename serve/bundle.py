"""Several messages of an engine sent as one: a step that says something to each of many requests wakes the daemon once."""

from collections.abc import Iterator

import zmq

from serve.protocol import NUM_FRAMES, Message, decode, encode


class Bundle:
    """The end of the link that is the engine's: what is added goes out, in order, with the next `send`."""

    def __init__(self, link: zmq.Socket[bytes]) -> None:
        self._link = link
        self._frames: list[bytes] = []

    def add(self, message: Message) -> None:
        """One more message."""
        self._frames += encode(message)

    def send(self) -> None:
        """All of them, if there are any."""
        if self._frames:
            frames, self._frames = self._frames, []
            self._link.send_multipart(frames)


def unpack(frames: list[bytes]) -> Iterator[Message]:
    """The messages of a bundle; raises `ProtocolError` for what is none."""
    for start in range(0, len(frames), NUM_FRAMES):
        yield decode(frames[start : start + NUM_FRAMES])
