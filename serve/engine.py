"""What an engine must be able to do, and the echo engine: a small honest one for tests and torch-free demos.

An engine knows no sockets and no terminal. It holds `num_slots` rows of key-value cache; the worker fills them.
"""

import codecs
import os
import time
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class EngineInfo:
    """What is loaded. `context` counts tokens of prompt and answer together, per slot."""

    model: str
    adapter: str | None
    hold: str
    dtype: str
    context: int
    num_slots: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy, top_k 0 and top_p 1 mean no limit."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Detokenizer(Protocol):
    """Tokens of one answer to text, never a part of a character."""

    def push(self, token: int) -> str:
        """The text that became certain with this token, "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end of the answer."""
        ...


class Engine(Protocol):
    """A loaded model with `info.num_slots` independent slots. Used from one thread."""

    @property
    def info(self) -> EngineInfo:
        """What is loaded."""
        ...

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """The conversation as tokens; raises `ValueError` (one line) for one that the template refuses."""
        ...

    def detokenizer(self) -> Detokenizer:
        """A fresh one for one answer."""
        ...

    def prefill(self, slot: int, ids: list[int], sampling: Sampling) -> int:
        """Occupy a slot with a prompt and return the first token of the answer; if it raises, the slot stays free."""
        ...

    def step(self, slots: list[int]) -> list[int]:
        """The next token of each of these occupied slots, in the same order."""
        ...

    def free(self, slot: int) -> None:
        """Give the slot back."""
        ...


class Utf8Detokenizer:
    """For engines whose tokens below 256 are UTF-8 bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """See `Detokenizer.push`."""
        return self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        return self._decoder.decode(b"", final=True)


class EchoEngine:
    """Answers with the last message, one UTF-8 byte a token; `$AFINAR_ECHO_DELAY` seconds pass with every token."""

    STOP = 256
    TURN = 257

    def __init__(self) -> None:
        self.info = EngineInfo("echo", None, "echo", "none", context=2048, num_slots=8, stop_ids=(self.STOP,))
        self._delay = float(os.environ.get("AFINAR_ECHO_DELAY", "0"))
        self._answers: dict[int, list[int]] = {}

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """One `TURN` token before the bytes of each message."""
        if messages[-1]["role"] != "user":
            raise ValueError("the last turn of a conversation must be the user's")
        return [token for message in messages for token in (self.TURN, *message["content"].encode())]

    def detokenizer(self) -> Utf8Detokenizer:
        """See `Engine.detokenizer`."""
        return Utf8Detokenizer()

    def prefill(self, slot: int, ids: list[int], sampling: Sampling) -> int:
        """Remember the last turn, backwards, so that each step takes the last element."""
        last_turn = len(ids) - ids[::-1].index(self.TURN)
        self._answers[slot] = [self.STOP, *reversed(ids[last_turn:])]
        return self.step([slot])[0]

    def step(self, slots: list[int]) -> list[int]:
        """See `Engine.step`."""
        time.sleep(self._delay)
        return [self._answers[slot].pop() for slot in slots]

    def free(self, slot: int) -> None:
        """See `Engine.free`."""
        del self._answers[slot]
