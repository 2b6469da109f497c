"""The engine process: `python -m serve.engine_process {what to load, as JSON}`, started by the daemon and gone with it."""

import dataclasses
import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import zmq

from serve.bundle import Bundle
from serve.echo import open_echo
from serve.engine import Engine
from serve.errors import EXIT_ENGINE, EXIT_USAGE, UserError
from serve.faults import first_line
from serve.inbox import Inbox
from serve.lifeline import follow_parent
from serve.load import Load
from serve.protocol import NO_REQUEST, Code, Kind, Message, error
from serve.worker import Worker

PROGRESS_SECONDS = 0.05


def build(load: Load, send: Callable[[Message], None]) -> Engine:
    """Load the engine, telling the daemon how far it is."""
    if load.hold == "echo":
        return open_echo(load)
    # The garbage collector finds nothing in new modules, and goes through all of them again and again.
    gc.disable()
    from serve.slot_engine import open_engine

    gc.freeze()
    gc.enable()
    last_stage, last_time = "", 0.0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last_stage, last_time
        now = time.monotonic()
        if stage != last_stage or done == total or now - last_time >= PROGRESS_SECONDS:
            last_stage, last_time = stage, now
            send(Message(Kind.PROGRESS, body={"stage": stage, "done": done, "total": total}))

    return open_engine(load, progress)


def loop(worker: Worker, link: zmq.Socket[bytes]) -> NoReturn:
    """Serve for ever: sleep while there is nothing to do, never wait while somebody wants a token."""
    inbox = Inbox(link, worker)
    while True:
        while worker.is_idle and inbox.is_empty and worker.engine.reserve():
            pass
        inbox.take()
        worker.turn()


def main(args: list[str]) -> int:
    """Load, report READY, serve; the process ends by a signal, or with exit code 6 if the run cannot be loaded, 2 if it must not be."""
    load = Load.from_json(args[0])
    # The terminal sends Ctrl-C to the whole process group; the daemon decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent(signal.SIGKILL)
    context = zmq.Context()
    link = context.socket(zmq.PAIR)
    link.connect(load.endpoint)

    bundle = Bundle(link)

    def send(message: Message) -> None:
        bundle.add(message)
        bundle.send()

    try:
        engine = build(load, send)
    except Exception as fault:
        traceback.print_exc()
        send(error(NO_REQUEST, Code.ENGINE, first_line(fault)))
        context.destroy(linger=1000)
        return EXIT_USAGE if isinstance(fault, UserError) else EXIT_ENGINE
    send(Message(Kind.READY, body={"info": dataclasses.asdict(engine.info)}))
    loop(Worker(engine, bundle.add, bundle.send), link)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
