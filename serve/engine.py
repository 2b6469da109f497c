"""What an engine must be able to do. An engine knows no sockets and no terminal: it holds rows of keys and values.

A request is started in a slot, its prompt is read in chunks, and from then on every step gives it one more token.
"""

from dataclasses import dataclass
from typing import Any, Protocol

BASE = "base"


class AdapterError(ValueError):
    """An adapter that cannot be served, or is not there; one line that ends with what to try."""


class TooLongError(ValueError):
    """A conversation that certainly has more tokens than the context; they were not counted."""


@dataclass(frozen=True)
class AdapterInfo:
    """Something that answers: the bare base, or a run's adapter, known by the digest of its file.

    `matched` of `total` tensors found their place; `kl` is how far it moves the next token from the base on a fixed
    probe, in nats. `context` counts the tokens of prompt and answer together. Loading took `load_s` seconds. `system` is the
    system turn that it was trained with, "" for none.
    """

    name: str
    digest: str
    method: str
    context: int
    matched: int = 0
    total: int = 0
    kl: float | None = None
    run: str = ""
    load_s: float = 0.0
    system: str = ""

    @property
    def key(self) -> str:
        """`name@digest`, or the name alone where there is no file."""
        return f"{self.name}@{self.digest}" if self.digest else self.name

    def as_trained(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation behind the system turn that was trained, unless it has its own."""
        if not self.system or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


@dataclass(frozen=True)
class EngineInfo:
    """What is loaded. `chunk` is the most prompt tokens that a turn reads while others are answered; `graphs` says whether CUDA graphs are used.

    `notes` are plain sentences that a person should read.
    """

    model: str
    base: str
    hold: str
    dtype: str
    devices: tuple[str, ...]
    context: int
    num_slots: int
    chunk: int
    stop_ids: tuple[int, ...]
    adapters: tuple[AdapterInfo, ...]
    graphs: str = "off"
    merge_kl: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0, or below 1e-5, is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1: no limit.

    `seed` None asks for a drawn one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Read:
    """How far the prompt in a slot has been read, in tokens; `token` is the first of the answer, once all is read."""

    slot: int
    done: int
    total: int
    token: int | None = None


class Detokenizer(Protocol):
    """Tokens of one answer to text, never a part of a character."""

    def push(self, token: int) -> str:
        """The text that became certain with this token, "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end of the answer."""
        ...


class Engine(Protocol):
    """A loaded model with `info.num_slots` independent slots. Used from one thread.

    A token of -1 means that the logits were not numbers: that request is lost, the others are not.
    """

    @property
    def info(self) -> EngineInfo:
        """What is loaded."""
        ...

    def prompt_ids(self, messages: list[dict[str, Any]], context: int | None = None) -> list[int]:
        """The conversation as tokens; raises `ValueError` (one line) for one that the template refuses.

        With a `context`, in tokens, it may raise `TooLongError` in place of counting what cannot fit.
        """
        ...

    def detokenizer(self) -> Detokenizer:
        """A fresh one for one answer."""
        ...

    def start(self, slot: int, ids: list[int], sampling: Sampling, adapter: str) -> int:
        """Occupy a slot; how many of the ids were read before, by this adapter, and need no reading again."""
        ...

    def prefill(self, slots: list[int], chunk: int = 0) -> list[Read]:
        """Read a chunk more of the prompts in these slots, together at most `chunk` tokens; 0 stands for `info.chunk`."""
        ...

    def step(self) -> dict[int, int]:
        """The next token of every slot whose prompt has been read."""
        ...

    def free(self, slot: int) -> None:
        """Give the slot back."""
        ...

    def reserve(self) -> bool:
        """Called while nobody waits: have the system give a little more of the memory that answers will need.

        Whether there is more to reserve; takes a few milliseconds.
        """
        ...

    def load_adapter(self, run: str) -> AdapterInfo:
        """Serve the adapter of one more finished run, under its digest; raises `AdapterError`."""
        ...

    def unload_adapter(self, key: str) -> None:
        """Forget an adapter that no slot uses; raises `AdapterError`."""
        ...


def resolve(adapters: tuple[AdapterInfo, ...], wanted: str | None) -> AdapterInfo:
    """The adapter that a request means: None the first name, a name the newest of that name, `name@digest` exactly that.

    A digest may be shortened. Raises `AdapterError`.
    """
    name, _, digest = (adapters[0].name if wanted is None else wanted).partition("@")
    fitting = [a for a in adapters if a.name == name and a.digest.startswith(digest)]
    if not fitting:
        names = ", ".join(dict.fromkeys(a.name for a in adapters))
        raise AdapterError(f"no adapter {wanted!r} is loaded; choose from: {names}")
    return fitting[-1]
