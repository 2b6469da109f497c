"""The daemon: two ROUTER sockets for clients and the engine processes, all in one asyncio loop. Torch-free."""

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from serve import curve, events, keys, runtime
from serve.allocator import return_large_buffers
from serve.arguments import Arguments
from serve.broker import Broker
from serve.engines import Engines, rss_bytes
from serve.errors import EXIT_DONE, ServeError
from serve.lifeline import follow_parent
from serve.metrics import serve_metrics
from serve.open_requests import Lane, Sent
from serve.progress import Progress
from serve.protocol import MAX_CONTROL_BYTES, MAX_MESSAGE_BYTES, Code, Kind, Message, ProtocolError, decode, encode
from serve.wire import send_now

TICK_SECONDS = 0.1
LINGER_MS = 1000
# Messages of one connection that are taken before they are read; each may be as long as its socket allows.
UNREAD = {Lane.DATA: 4, Lane.CONTROL: 16}


class Daemon:
    """Serves one or several runs until a signal, an admin's word, or the end of the last engine process."""

    def __init__(self, arguments: Arguments, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._log = events.open_log(folder / f"{arguments.name}.events.log")
        self._context = zmq.asyncio.Context()
        self._pair = keys.daemon_pair() if arguments.listen else None
        self._guard = curve.Guard(self._context, lambda key: self._log("refused", key=key))
        if self._pair is not None:
            # Before there is a door.
            self._guard.start()
        self._sockets = {lane: self._router(lane) for lane in Lane}
        self._admin = secrets.token_hex(16)
        self._broker = Broker(
            self._send,
            lambda number, message: self._engines.forward(number, message),
            arguments.settings,
            self._admin,
            self._log,
            self.leave,
            rss_bytes,
        )
        self._engines = Engines(arguments, folder, self._context, self._broker.dispatch, self._on_engine, self._log)
        self._progress = Progress(sys.stdout)
        self._draining, self._ending = asyncio.Event(), asyncio.Event()

    def _endpoint(self, socket: str) -> str:
        return f"ipc://{runtime.socket_path(self._folder, self._arguments.name, socket)}"

    def _router(self, lane: Lane) -> zmq.asyncio.Socket:
        router = self._context.socket(zmq.ROUTER)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES if lane is Lane.DATA else MAX_CONTROL_BYTES)
        router.set(zmq.RCVHWM, UNREAD[lane])
        if self._pair is not None:
            curve.guard_router(router, self._pair)
            curve.bind(router, self._arguments.listen, int(lane is Lane.CONTROL))
        router.bind(self._endpoint(lane.value))
        return router

    async def run(self) -> int:
        """Serve; the exit code 0 after a signal. Raises `EngineError` or `UserError` when no engine is left."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.leave, False)
        jobs: list[asyncio.Task[Any]] = []
        metrics: ThreadingHTTPServer | None = None
        try:
            if self._arguments.metrics:
                metrics = serve_metrics(self._arguments.metrics, self._broker.status)
            runtime.publish(self._folder, self._record())
            self._log("start", pid=os.getpid(), runs=self._arguments.runs, hold=self._arguments.hold)
            engines = asyncio.create_task(self._engines.run())
            leaving = asyncio.create_task(self._until_drained())
            jobs = [engines, leaving, *(asyncio.create_task(job) for job in self._jobs())]
            finished, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for task in finished - {engines}:
                task.result()
            if leaving not in finished:
                raise self._no_engine_left(engines.result())
            self._broker.end(Code.DRAINING, "the daemon is stopping; try: make chat")
            return EXIT_DONE
        finally:
            self._progress.clear()
            if metrics is not None:
                await asyncio.to_thread(metrics.shutdown)
                metrics.server_close()
            await self._stop(jobs)

    def leave(self, now: bool) -> None:
        """Take no more requests, finish those that are open, and end; at once when `now`, or when asked again."""
        if now or self._draining.is_set():
            self._ending.set()
        if not self._draining.is_set():
            self._draining.set()
            self._broker.drain()
            self._log("drain", open=self._broker.num_open)

    def _jobs(self) -> list[Coroutine[Any, Any, None]]:
        return [
            self._listen(Lane.CONTROL, self._broker.on_control),
            self._listen(Lane.DATA, self._broker.on_data),
            self._tick(),
        ]

    async def _listen(self, lane: Lane, handle: Callable[[bytes, Message], None]) -> None:
        while True:
            sender, *frames = await self._sockets[lane].recv_multipart()
            try:
                handle(sender, decode(frames))
            except ProtocolError as fault:
                self._broker.refuse(lane, sender, fault)
            except Exception as fault:
                self._broker.refuse(lane, sender, self._mistake(fault, frames))
            # Reading what is there already never waits: without this, one who floods us would be the only one heard.
            await asyncio.sleep(0)

    def _mistake(self, fault: Exception, frames: list[bytes]) -> ProtocolError:
        """We failed at a message, whatever it was; nobody else shall suffer for it."""
        # Not what the exception says: it may quote what somebody wrote.
        place = traceback.extract_tb(fault.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        self._log("mistake", what=type(fault).__name__, where=where)
        return ProtocolError(Code.INTERNAL, f"a mistake of the daemon's ({where}); try another question", *frames[2:3])

    def _on_engine(self, number: int, message: Message) -> None:
        is_loading = self._broker.state == "loading"
        if is_loading and message.kind is Kind.PROGRESS:
            self._progress.show(message.body["stage"], message.body["done"], message.body["total"])
        self._broker.dispatch.on_engine(number, message)
        if message.kind is Kind.READY:
            self._log("ready", engine=number)
            if is_loading:
                self._progress.clear()
                print(ready_line(self._arguments, message.body["info"]), flush=True)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._broker.tick()
            for number in self._broker.hung():
                if self._engines.kill(number):
                    self._log("engine hung", engine=number)

    async def _until_drained(self) -> None:
        await self._draining.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._arguments.settings.drain_s):
                while self._broker.num_open and not self._ending.is_set():
                    await asyncio.sleep(TICK_SECONDS / 2)

    def _send(self, lane: Lane, receiver: bytes, message: Message) -> Sent:
        try:
            send_now(self._sockets[lane], [receiver, *encode(message)])
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as fault:
            if fault.errno != zmq.EHOSTUNREACH:
                raise
            return Sent.GONE
        return Sent.OK

    def _record(self) -> runtime.Record:
        pid = os.getpid()
        started = runtime.start_time(pid)
        assert started is not None
        return runtime.Record(
            name=self._arguments.name,
            run=self._arguments.run,
            hold=self._arguments.hold,
            data=self._endpoint("data"),
            control=self._endpoint("control"),
            pid=pid,
            started=started,
            epoch=self._broker.epoch,
            # Clients may be in another folder.
            runs=tuple(str(Path(run).absolute()) for run in self._arguments.runs),
            admin=self._admin,
            server_key=self._pair.public if self._pair is not None else "",
        )

    def _no_engine_left(self, why: ServeError) -> ServeError:
        self._broker.end(Code.ENGINE, f"{str(why).partition('; see ')[0]}; the daemon leaves")
        return why

    async def _stop(self, jobs: list[asyncio.Task[Any]]) -> None:
        for task in jobs:
            task.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await self._engines.stop()
        self._log("stop", **self._broker.figures.endings)
        self._guard.stop()
        self._context.destroy(linger=LINGER_MS)


def ready_line(arguments: Arguments, info: dict[str, Any]) -> str:
    """The one line that says that the daemon is up."""
    where = f", on tcp {arguments.listen}" if arguments.listen else ""
    size = f"{info['num_slots']} slots x {info['context']} tokens"
    return (
        f"ready: {' '.join(arguments.runs)} ({info['hold']}, {info['dtype']}) {size}{where}; talk to it with: make chat"
    )


def main(arguments: Arguments) -> int:
    """Serve in the foreground; returns the exit code."""
    follow_parent(signal.SIGTERM)
    return_large_buffers()
    # What has been imported stays: to look through it takes the collector tens of milliseconds, and clients wait meanwhile.
    gc.freeze()
    os.umask(0o077)
    folder = runtime.directory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.claimed(folder, arguments.name))
        return asyncio.run(_serve(arguments, folder))


async def _serve(arguments: Arguments, folder: Path) -> int:
    try:
        return await Daemon(arguments, folder).run()
    except zmq.ZMQError as fault:
        raise ServeError(f"the sockets in {folder} failed: {fault}; try another AFINAR_RUNTIME_DIR") from fault
