"""The daemon: two ROUTER sockets for clients, one engine process behind a PAIR, all in one asyncio loop. Torch-free."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TextIO

import zmq
import zmq.asyncio

from serve import runtime
from serve.arguments import Arguments
from serve.broker import Broker
from serve.errors import EXIT_DONE, EXIT_USAGE, EngineError, ServeError, UserError
from serve.lifeline import child_environment, follow_parent
from serve.open_requests import Lane, Sent
from serve.progress import Progress
from serve.protocol import MAX_MESSAGE_BYTES, Code, Kind, Message, ProtocolError, decode, encode
from serve.wire import send_now

TICK_SECONDS = 0.5
LINGER_MS = 1000
ENGINE_STOP_SECONDS = 5.0


class Daemon:
    """Serves one run until a signal or the end of the engine process."""

    def __init__(self, arguments: Arguments, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._context = zmq.asyncio.Context()
        self._sockets = {lane: self._router(lane) for lane in Lane}
        self._link = self._context.socket(zmq.PAIR)
        # The broker bounds the queue; a limit here would block the loop.
        self._link.set(zmq.SNDHWM, 0)
        self._link.bind(self._endpoint("engine"))
        self._broker = Broker(self._send, self._forward)
        self._progress = Progress(sys.stdout)
        self._failure = ""

    def _endpoint(self, socket: str) -> str:
        return f"ipc://{runtime.socket_path(self._folder, self._arguments.name, socket)}"

    def _router(self, lane: Lane) -> zmq.asyncio.Socket:
        router = self._context.socket(zmq.ROUTER)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        router.bind(self._endpoint(lane.value))
        return router

    async def run(self) -> int:
        """Serve; the exit code 0 after a signal. Raises `EngineError` when the engine process ends by itself."""
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        runtime.publish(self._folder, self._record())
        with self._engine_log() as log:
            engine = await self._start_engine(log)
        tasks = [asyncio.create_task(job) for job in self._jobs()]
        endings = [asyncio.create_task(stop.wait()), asyncio.create_task(engine.wait())]
        try:
            finished, _ = await asyncio.wait([*endings, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in finished.intersection(tasks):
                task.result()
            if endings[0] in finished:
                self._broker.end(Code.DRAINING, "the daemon is stopping; try: make chat")
                return EXIT_DONE
            raise await self._engine_failed(engine)
        finally:
            self._progress.clear()
            await self._stop(engine, [*tasks, *endings])

    def _jobs(self) -> list[Coroutine[Any, Any, None]]:
        return [
            self._listen(Lane.CONTROL, self._broker.on_control),
            self._listen(Lane.DATA, self._broker.on_data),
            self._listen_to_engine(),
            self._tick(),
        ]

    async def _listen(self, lane: Lane, handle: Callable[[bytes, Message], None]) -> None:
        while True:
            sender, *frames = await self._sockets[lane].recv_multipart()
            try:
                handle(sender, decode(frames))
            except ProtocolError as fault:
                self._broker.refuse(lane, sender, fault)

    async def _listen_to_engine(self) -> None:
        while True:
            message = decode(await self._link.recv_multipart())
            if message.kind is Kind.PROGRESS:
                self._progress.show(message.body["stage"], message.body["done"], message.body["total"])
            elif message.kind is Kind.ERROR and not any(message.request):
                # The last words of an engine that could not load; its end is noticed by `run`.
                self._failure = message.body["message"]
                continue
            self._broker.on_engine(message)
            if message.kind is Kind.READY:
                self._progress.clear()
                print(ready_line(self._arguments, message.body["info"]), flush=True)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._broker.tick()

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

    def _forward(self, message: Message) -> None:
        send_now(self._link, encode(message))

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
        )

    @property
    def _log_path(self) -> Path:
        return self._folder / f"{self._arguments.name}.engine.log"

    def _engine_log(self) -> TextIO:
        return self._log_path.open("w")

    async def _start_engine(self, log: TextIO) -> asyncio.subprocess.Process:
        words = [self._endpoint("engine"), self._arguments.run, self._arguments.hold, self._arguments.dtype]
        return await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "serve.worker", *words],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Threads spin only briefly while they wait, so that a shared processor does not come to a crawl.
            env={"GOMP_SPINCOUNT": "10000", **child_environment()},
        )

    async def _engine_failed(self, engine: asyncio.subprocess.Process) -> ServeError:
        # What it said last may still be in the socket.
        await asyncio.sleep(0.1)
        why = self._failure or f"the engine process died ({how_it_ended(engine.returncode)})"
        self._broker.end(Code.ENGINE, f"{why}; the daemon leaves")
        if engine.returncode == EXIT_USAGE:
            return UserError(why)
        return EngineError(f"{why}; see {self._log_path}")

    async def _stop(self, engine: asyncio.subprocess.Process, tasks: list[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if engine.returncode is None:
            engine.terminate()
            try:
                await asyncio.wait_for(engine.wait(), ENGINE_STOP_SECONDS)
            except TimeoutError:
                engine.kill()
                await engine.wait()
        self._context.destroy(linger=LINGER_MS)


def how_it_ended(returncode: int | None) -> str:
    """`exit code 1` or `SIGKILL`."""
    if returncode is not None and returncode < 0:
        return signal.Signals(-returncode).name
    return f"exit code {returncode}"


def ready_line(arguments: Arguments, info: dict[str, Any]) -> str:
    """The one line that says that the daemon is up."""
    size = f"{info['num_slots']} slots x {info['context']} tokens"
    return f"ready: {arguments.run} ({info['hold']}, {info['dtype']}) {size}; talk to it with: make chat"


def main(arguments: Arguments) -> int:
    """Serve in the foreground; returns the exit code."""
    follow_parent(signal.SIGTERM)
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
