"""Who waits, who sits in which slot, and when an answer is over. Pure bookkeeping: no torch, no sockets."""

import time
from collections import deque
from dataclasses import dataclass, field

from serve.engine import Detokenizer, EngineInfo, Sampling


@dataclass
class Request:
    """One request in the engine process. `generated` counts the answer's tokens, the stop token not among them."""

    id: bytes
    ids: list[int]
    sampling: Sampling
    limit: int
    detokenizer: Detokenizer
    generated: int = 0
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    answering: float = 0.0

    def take(self, token: int, info: EngineInfo) -> tuple[str, str | None]:
        """Count a token of the answer: the text that became certain, and the reason if the answer is over with it."""
        if token in info.stop_ids:
            return self.detokenizer.flush(), "stop"
        self.generated += 1
        text = self.detokenizer.push(token)
        if self.generated < self.limit:
            return text, None
        return text + self.detokenizer.flush(), "length"

    def usage(self) -> dict[str, int | float]:
        """Token counts, and milliseconds spent waiting, reading the prompt, and writing the answer."""
        now = time.monotonic()
        return {
            "prompt_tokens": len(self.ids),
            "completion_tokens": self.generated,
            "queued_ms": round((self.admitted - self.arrived) * 1e3, 1),
            "prefill_ms": round((self.answering - self.admitted) * 1e3, 1),
            "decode_ms": round((now - self.answering) * 1e3, 1),
        }


def answer_limit(num_prompt: int, max_tokens: int | None, context: int) -> int:
    """How many tokens an answer may have: what the user allows and what the context has room for."""
    room = context - num_prompt
    return room if max_tokens is None else min(max_tokens, room)


class SlotTable:
    """First come, first served, over a fixed number of slots."""

    def __init__(self, num_slots: int) -> None:
        self.waiting: deque[Request] = deque()
        self.occupied: dict[int, Request] = {}
        self._free = list(reversed(range(num_slots)))

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def admit(self) -> tuple[int, Request] | None:
        """Give the request that waited longest a free slot; None if nobody waits or no slot is free."""
        if not self.waiting or not self._free:
            return None
        slot = self._free.pop()
        request = self.occupied[slot] = self.waiting.popleft()
        request.admitted = time.monotonic()
        return slot, request

    def release(self, slot: int) -> None:
        """The slot is free again."""
        del self.occupied[slot]
        self._free.append(slot)

    def withdraw(self, request_id: bytes) -> bool:
        """Take a request out of the queue; False if it does not wait."""
        for request in self.waiting:
            if request.id == request_id:
                self.waiting.remove(request)
                return True
        return False

    def find(self, request_id: bytes) -> int | None:
        """The slot a request sits in, None if it has none."""
        return next((slot for slot, request in self.occupied.items() if request.id == request_id), None)
