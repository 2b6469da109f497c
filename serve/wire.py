"""Sending without waiting, on an asyncio socket."""

import asyncio

import zmq
import zmq.asyncio


def send_now(socket: zmq.asyncio.Socket, frames: list[bytes]) -> None:
    """Send or raise at once: `zmq.Again` when the queue is full, EHOSTUNREACH (`zmq.ZMQError`) without the peer."""
    # With DONTWAIT the future is over when it is returned, and the reads that wait on this socket are seen to.
    future = socket.send_multipart(frames, flags=zmq.DONTWAIT)
    assert isinstance(future, asyncio.Future)
    future.result()
