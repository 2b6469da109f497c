"""The engines as the daemon sees them: who gets a request, who is ready, who has died, who hangs. No processes here."""

import time
from collections.abc import Callable
from typing import Any

from serve.administration import Administration
from serve.answers import Answers
from serve.fleet import EngineState, Fleet
from serve.open_requests import OpenRequest
from serve.protocol import NO_REQUEST, Code, Kind, Message


class Dispatch:
    """`on_ready` hears of every engine that has loaded, `on_loading` how far one is."""

    def __init__(
        self,
        forward: Callable[[int, Message], None],
        fleet: Fleet,
        answers: Answers,
        administration: Administration,
        on_ready: Callable[[], None],
        on_loading: Callable[[Message], None],
    ) -> None:
        self._forward, self._fleet, self._answers, self._administration = forward, fleet, answers, administration
        self._on_ready, self._on_loading = on_ready, on_loading

    def place(self, request: OpenRequest) -> None:
        """Give a request to an engine, if one is ready."""
        asked = request.whole()
        engine = self._fleet.choose(asked)
        if engine is None:
            return
        request.engine = engine
        request.num_starts += 1
        chosen = self._fleet.engines[engine]
        if not chosen.open:
            # It had nothing to say until now.
            chosen.last_heard = time.monotonic()
        chosen.open.add(request.id)
        body = {**asked.to_body(), "client": request.session.number}
        self._forward(engine, Message(Kind.SUBMIT, request.id, body))

    def wanted(self, runs: tuple[str, ...]) -> tuple[str, ...]:
        """Which of these runs an engine that starts shall load."""
        return self._administration.wanted(runs)

    def engine_starts(self, number: int, pid: int) -> None:
        """An engine process was started, for the first time or again."""
        self._fleet.engines[number] = EngineState(pid=pid)
        self._fleet.forget(number)

    def engine_died(self, number: int, why: str) -> None:
        """Its requests go to another engine if they have not said a word, else they end with an error."""
        engine = self._fleet.engines[number]
        engine.state = "down"
        for request in [r for r in self._answers.open.values() if r.engine == number and r.terminal is None]:
            request.engine, request.is_in_slot = None, False
            if request.tokens or request.num_starts > 1:
                self._answers.end(request, Code.ENGINE, f"{why}; try again", tokens=request.tokens)
            else:
                self.place(request)
        engine.open.clear()
        engine.in_slots.clear()
        engine.leaving.clear()
        self._administration.engine_died(number, why)

    def on_engine(self, number: int, message: Message) -> None:
        """PROGRESS, READY, ADAPTERS, or news of a request."""
        engine = self._fleet.engines[number]
        engine.last_heard = time.monotonic()
        if message.kind is Kind.READY:
            engine.state, engine.info = "ready", message.body["info"]
            self._administration.engine_ready(number)
            self._on_ready()
            for request in [r for r in self._answers.open.values() if r.engine is None and r.terminal is None]:
                self.place(request)
        elif message.kind is Kind.PROGRESS and message.request == NO_REQUEST:
            self._on_loading(message)
        elif not self._administration.on_engine(number, message):
            if message.kind in (Kind.DONE, Kind.ERROR):
                engine.open.discard(message.request)
                engine.in_slots.discard(message.request)
                engine.leaving.pop(message.request, None)
            elif message.kind is Kind.PROGRESS:
                engine.in_slots.add(message.request)
            self._answers.on_engine(message)

    def hung(self, after_s: float) -> list[int]:
        """Engines that have work and have said nothing for so many seconds."""
        now = time.monotonic()
        return [n for n, engine in self._fleet.ready.items() if engine.open and now - engine.last_heard > after_s]

    def status(self, rss_bytes: Callable[[int], int]) -> dict[str, Any]:
        """What STATUS says of the engines, all together and each."""
        engines = [engine for _, engine in sorted(self._fleet.engines.items())]
        return {
            "adapters": [adapter.key for adapter in self._fleet.first.adapters],
            "busy_slots": sum(len(engine.in_slots) for engine in engines),
            "num_slots": sum(engine.info["num_slots"] for engine in self._fleet.ready.values()),
            "engines": [
                {
                    "pid": engine.pid,
                    "state": engine.state,
                    "busy_slots": len(engine.in_slots),
                    "waiting": len(engine.open - engine.in_slots),
                    "rss_bytes": rss_bytes(engine.pid),
                }
                for engine in engines
            ],
        }
