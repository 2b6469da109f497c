"""Which engine answers a request. Pure."""

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from serve.engine import AdapterInfo
from serve.submission import Submission

MAX_CONVERSATIONS = 4096


@dataclass
class EngineState:
    """One engine process as the daemon sees it. `open` are the requests it has, `state` loading, ready or down.

    `leaving` are those of them that ended here while they waited there, with the number of their client: it may not even
    have read them yet.
    """

    state: str = "loading"
    info: dict[str, Any] = field(default_factory=dict)
    pid: int = 0
    open: set[bytes] = field(default_factory=set)
    in_slots: set[bytes] = field(default_factory=set)
    leaving: dict[bytes, int] = field(default_factory=dict)
    last_heard: float = field(default_factory=time.monotonic)

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """What can answer there."""
        return tuple(AdapterInfo(**fields) for fields in self.info.get("adapters", ()))


class Fleet:
    """Prefers the engine that answered the earlier turns: it has read them already."""

    def __init__(self) -> None:
        self.engines: dict[int, EngineState] = {}
        self._homes: OrderedDict[bytes, int] = OrderedDict()

    @property
    def ready(self) -> dict[int, EngineState]:
        """The engines that can answer."""
        return {number: engine for number, engine in self.engines.items() if engine.state == "ready"}

    @property
    def first(self) -> EngineState:
        """One that can answer, for what all of them have in common; an empty one as long as there is none."""
        return next(iter(self.ready.values()), EngineState())

    @property
    def leaving(self) -> list[int]:
        """Whose requests ended here and still wait in an engine, one number a request."""
        return [client for engine in self.engines.values() for client in engine.leaving.values()]

    def choose(self, asked: Submission) -> int | None:
        """The engine for a request: its conversation's, unless another one has slots and this one has a queue."""
        ready = self.ready
        if not ready:
            return None
        least = min(ready, key=lambda number: (len(ready[number].open), number))
        if len(ready) == 1:
            return least
        home = self._home(asked)
        if home not in ready:
            return least
        num_slots = ready[home].info["num_slots"]
        is_busy = len(ready[home].open) >= num_slots and len(ready[least].open) < ready[least].info["num_slots"]
        return least if is_busy else home

    def remember(self, asked: Submission, answer: str, engine: int) -> None:
        """This engine has read the conversation up to and with this answer."""
        *_, key = _digests(asked.adapter, [*asked.messages, {"role": "assistant", "content": answer}])
        self._homes[key] = engine
        self._homes.move_to_end(key)
        if len(self._homes) > MAX_CONVERSATIONS:
            self._homes.popitem(last=False)

    def forget(self, engine: int) -> None:
        """It was started again and has read nothing."""
        for key in [key for key, home in self._homes.items() if home == engine]:
            del self._homes[key]

    def _home(self, asked: Submission) -> int | None:
        homes = [self._homes.get(digest) for digest in _digests(asked.adapter, asked.messages[:-1])]
        return next((home for home in reversed(homes) if home is not None), None)


def _digests(adapter: str | None, messages: list[dict[str, Any]]) -> Iterator[bytes]:
    """One of the conversation up to each answer in it, in a single pass: it may have thousands of turns."""
    read = hashlib.sha256(json.dumps(adapter).encode())
    for message in messages:
        read.update(json.dumps(message).encode())
        if message["role"] == "assistant":
            yield read.digest()
