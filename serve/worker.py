"""The engine process: `python -m serve.worker ENDPOINT RUN HOLD DTYPE`, started by the daemon and gone with it.

Requests join and leave between steps: each turn of the loop admits at most one waiting request (its prefill delays the
others' next token) and then gives every occupied slot one more token.
"""

import dataclasses
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import zmq

from serve import submission
from serve.engine import EchoEngine, Engine
from serve.errors import EXIT_ENGINE, EXIT_USAGE, UserError
from serve.lifeline import follow_parent
from serve.protocol import NO_REQUEST, Code, Kind, Message, ProtocolError, decode, encode, error
from serve.slots import Request, SlotTable, answer_limit

Send = Callable[[Message], None]
PROGRESS_SECONDS = 0.05


class Worker:
    """Serves requests with one engine; `send` carries messages to the daemon."""

    def __init__(self, engine: Engine, send: Send) -> None:
        self.engine = engine
        self.table = SlotTable(engine.info.num_slots)
        self._send = send

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do until a message comes."""
        return not self.table.occupied and not self.table.waiting

    def receive_frames(self, frames: list[bytes]) -> None:
        """Like `receive`; what cannot be read, such as a conversation at the very limit of the size, is answered."""
        try:
            message = decode(frames)
        except ProtocolError as fault:
            self._send(error(fault.request, fault.code, str(fault)))
        else:
            self.receive(message)

    def receive(self, message: Message) -> None:
        """Take a SUBMIT or a CANCEL."""
        if message.kind is Kind.CANCEL:
            self._cancel(message.request)
        else:
            try:
                self._queue(message)
            except ProtocolError as fault:
                self._send(error(message.request, fault.code, str(fault)))
            except ValueError as fault:
                self._send(error(message.request, Code.BAD_REQUEST, first_line(fault)))
            except Exception as fault:
                traceback.print_exc()
                self._send(error(message.request, Code.ENGINE, first_line(fault)))

    def turn(self) -> None:
        """Admit one, then one token for everybody."""
        if admitted := self.table.admit():
            self._prefill(*admitted)
        if self.table.occupied:
            slots = sorted(self.table.occupied)
            for slot, token in zip(slots, self.engine.step(slots), strict=True):
                self._emit(slot, token)

    def _queue(self, message: Message) -> None:
        asked = submission.parse(message.body, message.request)
        ids = self.engine.prompt_ids(asked.messages)
        context = self.engine.info.context
        if len(ids) >= context:
            text = f"the conversation is {len(ids)} tokens and the model holds {context}; try /reset or a shorter text"
            self._send(error(message.request, Code.CONTEXT, text, have=len(ids), need=len(ids) + 1, max=context))
            return
        limit = answer_limit(len(ids), asked.max_tokens, context)
        self.table.add(Request(message.request, ids, asked.sampling, limit, self.engine.detokenizer()))

    def _prefill(self, slot: int, request: Request) -> None:
        self._send(Message(Kind.ACCEPTED, request.id, {"position": 0}))
        try:
            token = self.engine.prefill(slot, request.ids, request.sampling)
        except Exception as fault:
            # This prompt was too much for the engine; the other slots are untouched.
            traceback.print_exc()
            self.table.release(slot)
            self._send(error(request.id, Code.ENGINE, first_line(fault)))
            return
        request.answering = time.monotonic()
        self._emit(slot, token)

    def _emit(self, slot: int, token: int) -> None:
        request = self.table.occupied[slot]
        text, reason = request.take(token, self.engine.info)
        if text:
            self._send(Message(Kind.DELTA, request.id, {"text": text, "tokens": request.generated}))
        if reason is not None:
            self._free(slot)
            self._send(Message(Kind.DONE, request.id, {"reason": reason, "usage": request.usage()}))

    def _cancel(self, request_id: bytes) -> None:
        slot = self.table.find(request_id)
        if slot is not None:
            self._free(slot)
        elif not self.table.withdraw(request_id):
            return
        self._send(error(request_id, Code.CANCELLED, "cancelled"))

    def _free(self, slot: int) -> None:
        self.engine.free(slot)
        self.table.release(slot)


def first_line(fault: BaseException) -> str:
    """An exception as one line."""
    lines = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__


def build(run: str, hold: str, dtype: str, send: Send) -> Engine:
    """Load the engine, telling the daemon how far it is."""
    if hold == "echo":
        return EchoEngine()
    from serve.slot_engine import SlotEngine

    last_stage, last_time = "", 0.0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last_stage, last_time
        now = time.monotonic()
        if stage != last_stage or done == total or now - last_time >= PROGRESS_SECONDS:
            last_stage, last_time = stage, now
            send(Message(Kind.PROGRESS, body={"stage": stage, "done": done, "total": total}))

    return SlotEngine(Path(run), hold, dtype, progress)


def loop(worker: Worker, link: zmq.Socket[bytes]) -> NoReturn:
    """Serve for ever: sleep while there is nothing to do, never wait while somebody wants a token."""
    while True:
        while worker.is_idle or link.poll(0):
            worker.receive_frames(link.recv_multipart())
        worker.turn()


def main(args: list[str]) -> int:
    """Load, report READY, serve; the process ends by a signal, or with exit code 6 if the run cannot be loaded, 2 if it must not be."""
    endpoint, run, hold, dtype = args
    # The terminal sends Ctrl-C to the whole process group; the daemon decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent(signal.SIGKILL)
    context = zmq.Context()
    link = context.socket(zmq.PAIR)
    link.connect(endpoint)

    def send(message: Message) -> None:
        link.send_multipart(encode(message))

    try:
        engine = build(run, hold, dtype, send)
    except Exception as fault:
        traceback.print_exc()
        send(error(NO_REQUEST, Code.ENGINE, first_line(fault)))
        context.destroy(linger=1000)
        return EXIT_USAGE if isinstance(fault, UserError) else EXIT_ENGINE
    send(Message(Kind.READY, body={"info": dataclasses.asdict(engine.info)}))
    loop(Worker(engine, send), link)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
