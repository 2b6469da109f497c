"""The engine processes: one a device, each behind a PAIR socket of its own; one that dies is started again."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import zmq
import zmq.asyncio

from serve import runtime
from serve.arguments import MAX_ENGINES, Arguments
from serve.bundle import unpack
from serve.errors import EXIT_USAGE, EngineError, ServeError, UserError
from serve.lifeline import child_environment
from serve.load import Load
from serve.protocol import Kind, Message, encode
from serve.wire import send_now

STOP_SECONDS = 5.0
# What a process said last may still be in the socket when it has ended.
LAST_WORDS_SECONDS = 0.1
# An engine is given up at so many deaths, none of them after a calm minute of serving.
MAX_DEATHS = 3
CALM_SECONDS = 60.0


class Listener(Protocol):
    """Who hears of the engines: see `serve.dispatch`."""

    def wanted(self, runs: tuple[str, ...]) -> tuple[str, ...]:
        """Which of these runs an engine that starts shall load."""
        ...

    def engine_starts(self, number: int, pid: int) -> None:
        """A process was started."""
        ...

    def engine_died(self, number: int, why: str) -> None:
        """A process has ended by itself."""
        ...


@dataclass(eq=False)
class EngineProcess:
    """One life of an engine. `ready` is set, with `info`, at its READY; `last_words` is the ERROR of one that cannot load."""

    process: asyncio.subprocess.Process
    link: zmq.asyncio.Socket
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    info: dict[str, Any] = field(default_factory=dict)
    ready_at: float = 0.0
    last_words: str = ""
    is_killed: bool = False


class Engines:
    """Keeps the processes running. `on_message` gets what they say, with the number of the engine."""

    def __init__(
        self,
        arguments: Arguments,
        folder: Path,
        context: zmq.asyncio.Context,
        listener: Listener,
        on_message: Callable[[int, Message], None],
        log: Callable[..., None],
    ) -> None:
        self._arguments, self._folder, self._context = arguments, folder, context
        self._listener, self._on_message, self._log = listener, on_message, log
        self._living: dict[int, EngineProcess] = {}
        # What `auto` came to mean holds for every engine, whatever its runs.
        self._hold = arguments.hold
        self._num_starts = 0
        self._started: set[int] = set()
        self._first_ready = asyncio.Event()

    async def run(self) -> ServeError:
        """Serve until no engine is left; why. The first engine goes ahead: it may spread over all devices."""
        keepers = [asyncio.create_task(self._keep(0))]
        others = asyncio.create_task(self._first_ready.wait())
        try:
            await asyncio.wait([*keepers, others], return_when=asyncio.FIRST_COMPLETED)
            if others.done() and not self._is_spread():
                keepers += [asyncio.create_task(self._keep(number)) for number in range(1, self._arguments.num_gpus)]
            return (await asyncio.gather(*keepers))[-1]
        finally:
            for task in (*keepers, others):
                task.cancel()
            await asyncio.gather(*keepers, others, return_exceptions=True)

    def forward(self, number: int, message: Message) -> None:
        """Send to an engine. What does not reach one that has just died is seen to when its end is noticed."""
        with contextlib.suppress(KeyError, zmq.Again):
            send_now(self._living[number].link, encode(message))

    def kill(self, number: int) -> bool:
        """End an engine that hangs; it is started again like any that died. False if that was done before."""
        engine = self._living.get(number)
        if engine is None or engine.is_killed:
            return False
        engine.is_killed = True
        with contextlib.suppress(ProcessLookupError):
            engine.process.kill()
        return True

    async def stop(self) -> None:
        """End all processes."""
        await asyncio.gather(*(_end(engine.process) for engine in self._living.values()))

    def log_path(self, number: int) -> Path:
        """What an engine prints."""
        return self._folder / f"{self._arguments.name}.engine{number}.log"

    def _is_spread(self) -> bool:
        return 0 in self._living and len(self._living[0].info.get("devices", ())) > 1

    async def _keep(self, number: int) -> ServeError:
        """Start an engine, again and again; returns why it was given up."""
        num_deaths = 0
        while True:
            why, engine = await self._live(number)
            if number == 0 and not self._first_ready.is_set():
                # What cannot be loaded now will not load a second later.
                is_users = engine.process.returncode == EXIT_USAGE
                return UserError(why) if is_users else EngineError(f"{why}; see {self.log_path(number)}")
            is_calm = engine.ready.is_set() and time.monotonic() - engine.ready_at > CALM_SECONDS
            num_deaths = 1 if is_calm else num_deaths + 1
            self._log("engine died", engine=number, why=why, deaths=num_deaths)
            self._listener.engine_died(number, why)
            if num_deaths >= MAX_DEATHS:
                return EngineError(f"{why}; see {self.log_path(number)}")
            await asyncio.sleep(2.0 ** (num_deaths - 1))

    async def _live(self, number: int) -> tuple[str, EngineProcess]:
        """One life of an engine; why it ended."""
        engine = await self._start(number)
        listening = asyncio.create_task(self._listen(number, engine))
        try:
            await engine.process.wait()
            await asyncio.sleep(LAST_WORDS_SECONDS)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            if engine.process.returncode is not None:
                engine.link.close(linger=0)
                del self._living[number]
        return engine.last_words or f"the engine process died ({how_it_ended(engine.process.returncode)})", engine

    async def _start(self, number: int) -> EngineProcess:
        # Every life has a socket of its own: nothing that a dead engine said can be taken for the words of the next one.
        socket = f"engine{self._num_starts % MAX_ENGINES}"
        endpoint = f"ipc://{runtime.socket_path(self._folder, self._arguments.name, socket)}"
        self._num_starts += 1
        link = self._context.socket(zmq.PAIR)
        # The broker bounds the queue; a limit here would block the loop.
        link.set(zmq.SNDHWM, 0)
        link.bind(endpoint)
        a = self._arguments
        runs = self._listener.wanted(a.runs)
        load = Load(runs, self._hold, a.dtype, a.settings, endpoint, device=number, num_devices=a.num_gpus)
        with self.log_path(number).open("a" if number in self._started else "w") as log:
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "serve.engine_process", load.to_json()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=engine_environment(a.num_gpus),
            )
        self._started.add(number)
        engine = self._living[number] = EngineProcess(process, link)
        self._listener.engine_starts(number, process.pid)
        self._log("engine started", engine=number, engine_pid=process.pid)
        return engine

    async def _listen(self, number: int, engine: EngineProcess) -> None:
        while True:
            for message in unpack(await engine.link.recv_multipart()):
                self._hear(number, engine, message)
            # Reading what is there already never waits; clients and other engines shall be heard in between.
            await asyncio.sleep(0)

    def _hear(self, number: int, engine: EngineProcess, message: Message) -> None:
        if message.kind is Kind.READY:
            engine.info, engine.ready_at = message.body["info"], time.monotonic()
            self._hold = engine.info["hold"]
            engine.ready.set()
        elif message.kind is Kind.ERROR and not any(message.request) and not engine.ready.is_set():
            engine.last_words = message.body["message"]
            return
        self._on_message(number, message)
        if engine.ready.is_set():
            self._first_ready.set()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


def engine_environment(num_engines: int) -> dict[str, str]:
    """The environment of an engine process; several without a GPU share the cores. What the user has set stays."""
    # Threads spin only briefly while they wait, so that a shared processor does not come to a crawl. And bitsandbytes, which
    # PEFT imports, shall not bring torch's compiler along: nothing here is compiled, and it takes a second and a half.
    chosen = {"GOMP_SPINCOUNT": "10000", "TORCHDYNAMO_DISABLE": "1"}
    if num_engines > 1 and shutil.which("nvidia-smi") is None:
        chosen["OMP_NUM_THREADS"] = str(max(len(os.sched_getaffinity(0)) // num_engines, 1))
    return {**chosen, **child_environment()}


def how_it_ended(returncode: int | None) -> str:
    """`exit code 1` or `SIGKILL`."""
    if returncode is not None and returncode < 0:
        return signal.Signals(-returncode).name
    return f"exit code {returncode}"


def rss_bytes(pid: int) -> int:
    """The memory that a process holds (Linux), 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
