"""Who waits, who sits in which slot, and when an answer is over. Pure bookkeeping: no torch, no sockets."""

import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from serve.engine import AdapterInfo, Detokenizer
from serve.stops import StopStrings
from serve.submission import Submission


@dataclass
class Request:
    """One request in the engine process. `generated` counts the answer's tokens, the stop token not among them."""

    id: bytes
    client: int
    ids: list[int]
    asked: Submission
    adapter: AdapterInfo
    detokenizer: Detokenizer
    generated: int = 0
    reused: int = 0
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    answering: float = 0.0

    def __post_init__(self) -> None:
        self.limit = answer_limit(len(self.ids), self.asked.max_tokens, self.adapter.context)
        self.stop = ""
        self._stops = StopStrings(self.asked.stop)

    def take(self, token: int, stop_ids: Collection[int]) -> tuple[str, str | None]:
        """Count a token of the answer: the text that became certain, and the reason if the answer is over with it."""
        is_stop = token in stop_ids
        text = self.detokenizer.flush() if is_stop else self.detokenizer.push(token)
        self.generated += not is_stop
        text, found = self._stops.push(text)
        if found is not None:
            self.stop = found
            return text, "stop"
        if is_stop:
            return text + self._stops.flush(), "stop"
        if self.generated < self.limit:
            return text, None
        last, _ = self._stops.push(self.detokenizer.flush())
        return text + last + self._stops.flush(), "length"

    def usage(self) -> dict[str, int]:
        """Counts of tokens; those reused had been read before."""
        return {
            "prompt_tokens": len(self.ids),
            "reused_tokens": self.reused,
            "completion_tokens": self.generated,
        }

    def timings(self) -> dict[str, float]:
        """Milliseconds spent waiting, reading the prompt, and writing the answer after its first token."""
        now = time.monotonic()
        return {
            "queued_ms": round((self.admitted - self.arrived) * 1e3, 1),
            "prefill_ms": round((self.answering - self.admitted) * 1e3, 1),
            "decode_ms": round((now - self.answering) * 1e3, 1),
        }


def answer_limit(num_prompt: int, max_tokens: int | None, context: int) -> int:
    """How many tokens an answer may have: what the user allows and what the context has room for."""
    room = context - num_prompt
    return room if max_tokens is None else min(max_tokens, room)


class SlotTable:
    """A fixed number of slots; clients take turns, each client's own requests are first come, first served."""

    def __init__(self, num_slots: int) -> None:
        self.waiting: list[Request] = []
        self.occupied: dict[int, Request] = {}
        # Slots whose prompt is being read, oldest first, with the tokens that are left to read.
        self.reading: dict[int, int] = {}
        self._free = list(reversed(range(num_slots)))

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def admit(self) -> tuple[int, Request] | None:
        """Give a free slot to the oldest request of a client with the fewest slots; None if there is none to give."""
        if not self.waiting or not self._free:
            return None
        held = Counter(request.client for request in self.occupied.values())
        request = min(self.waiting, key=lambda waiting: held[waiting.client])
        self.waiting.remove(request)
        slot = self._free.pop()
        self.occupied[slot] = request
        self.reading[slot] = len(request.ids)
        request.admitted = time.monotonic()
        return slot, request

    def release(self, slot: int) -> None:
        """The slot is free again."""
        del self.occupied[slot]
        self.reading.pop(slot, None)
        self._free.append(slot)

    def withdraw(self, request_id: bytes) -> None:
        """Take a request out of the queue, if it is there."""
        self.waiting = [request for request in self.waiting if request.id != request_id]

    def find(self, request_id: bytes) -> int | None:
        """The slot a request sits in, None if it has none."""
        return next((slot for slot, request in self.occupied.items() if request.id == request_id), None)

    def uses(self, key: str) -> bool:
        """Whether a request, waiting or in a slot, is answered by this adapter."""
        return any(request.adapter.key == key for request in (*self.waiting, *self.occupied.values()))
