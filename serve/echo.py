"""The echo engine: a small honest one, for tests and torch-free demos. It answers with the last message."""

import codecs
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.allocator import return_large_buffers
from serve.engine import BASE, AdapterError, AdapterInfo, EngineInfo, Read, Sampling, TooLongError
from serve.errors import UserError
from serve.load import Load

CHUNK = 512


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
    """One UTF-8 byte a token; `$AFINAR_ECHO_DELAY` seconds pass with every step and every chunk.

    An adapter is a folder whose file `prefix` holds the text that it puts before its answers; a file `system` holds its
    system turn, if there is one.
    """

    STOP = 256
    TURN = 257

    def __init__(self, num_slots: int = 8, context: int = 2048) -> None:
        base = AdapterInfo(BASE, "", "none", context=context)
        self.info = EngineInfo(
            "echo", "echo", "echo", "none", ("cpu",), context=context, num_slots=num_slots, chunk=CHUNK,
            stop_ids=(self.STOP,), adapters=(base,),
        )  # fmt: skip
        self._delay = float(os.environ.get("AFINAR_ECHO_DELAY", "0"))
        self._prefixes: dict[str, bytes] = {BASE: b""}
        self._read: dict[int, tuple[int, int]] = {}
        self._answers: dict[int, list[int]] = {}

    def prompt_ids(self, messages: list[dict[str, Any]], context: int | None = None) -> list[int]:
        """One `TURN` token before the bytes of each message."""
        if messages[-1]["role"] != "user":
            raise ValueError("the last turn of a conversation must be the user's")
        if context is not None and sum(len(message["content"]) for message in messages) > context:
            raise TooLongError
        return [token for message in messages for token in (self.TURN, *message["content"].encode())]

    def detokenizer(self) -> Utf8Detokenizer:
        """See `Engine.detokenizer`."""
        return Utf8Detokenizer()

    def start(self, slot: int, ids: list[int], sampling: Sampling, adapter: str) -> int:
        """Keep the last turn, backwards, so that each step takes the last element."""
        last_turn = len(ids) - ids[::-1].index(self.TURN)
        self._answers[slot] = [self.STOP, *reversed(ids[last_turn:]), *reversed(self._prefixes[adapter])]
        self._read[slot] = (0, len(ids))
        return 0

    def prefill(self, slots: list[int], chunk: int = 0) -> list[Read]:
        """See `Engine.prefill`."""
        time.sleep(self._delay)
        return [self._advance(slot, (chunk or CHUNK) // len(slots)) for slot in slots]

    def _advance(self, slot: int, size: int) -> Read:
        done, total = self._read[slot]
        done = min(done + size, total)
        if done < total:
            self._read[slot] = (done, total)
            return Read(slot, done, total)
        del self._read[slot]
        return Read(slot, done, total, self._answers[slot].pop())

    def step(self) -> dict[int, int]:
        """See `Engine.step`."""
        time.sleep(self._delay)
        return {slot: answer.pop() for slot, answer in self._answers.items() if slot not in self._read}

    def free(self, slot: int) -> None:
        """See `Engine.free`."""
        del self._answers[slot]
        self._read.pop(slot, None)

    def reserve(self) -> bool:
        """Nothing is needed."""
        return False

    def load_adapter(self, run: str) -> AdapterInfo:
        """See `Engine.load_adapter`."""
        try:
            prefix = (Path(run) / "prefix").read_bytes()
        except OSError as fault:
            raise AdapterError(f"{run}: {fault.strerror}; try a folder with a file `prefix`") from None
        system = (Path(run) / "system").read_text() if (Path(run) / "system").is_file() else ""
        digest = hashlib.sha256(prefix).hexdigest()[:12]
        adapter = AdapterInfo(
            Path(run).name, digest, "echo", self.info.context, 1, 1, float(len(prefix)), run, 0.0, system
        )
        self._prefixes[adapter.key] = prefix
        others = tuple(a for a in self.info.adapters if a.key != adapter.key)
        self.info = replace(self.info, adapters=(*others, adapter))
        return adapter

    def unload_adapter(self, key: str) -> None:
        """See `Engine.unload_adapter`."""
        if key == BASE or key not in self._prefixes:
            raise AdapterError(f"{key} cannot be unloaded; try: /adapters")
        del self._prefixes[key]
        self.info = replace(self.info, adapters=tuple(a for a in self.info.adapters if a.key != key))


def open_echo(load: Load) -> EchoEngine:
    """An echo engine with the adapters of several runs; of a single one the base, as if merged. Raises `UserError`."""
    # Where torch is, it has use for the buffers that are kept.
    return_large_buffers()
    engine = EchoEngine(load.settings.slots or 8, load.settings.context or 2048)
    for run in load.runs if len(load.runs) > 1 else ():
        try:
            engine.load_adapter(run)
        except AdapterError as fault:
            raise UserError(str(fault)) from None
    return engine
