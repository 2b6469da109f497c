"""The pieces of an answer, and an answer as far as it has come to the client. No sockets here."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from serve.errors import RequestError, ServeError
from serve.protocol import NO_REQUEST, Code, Kind, Message

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@dataclass(frozen=True)
class Accepted:
    """The engine has counted: `position` in the queue, the tokens of the prompt, the adapter's key, how it is sampled."""

    position: int
    prompt_tokens: int
    max_tokens: int
    adapter: str
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Waiting:
    """`stage` queued: `done` others of `total` go first; prompt: `done` of `total` tokens have been read."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Delta:
    """The next piece of the answer; `tokens` counts the answer's tokens so far, `ids` are these if they were asked for."""

    text: str
    tokens: int
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Done:
    """The answer is over: `reason` is stop or length; `digest` the SHA-256 of its text, which was compared."""

    reason: str
    usage: dict[str, Any]
    timings: dict[str, Any]
    digest: str
    stop: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer after its first token."""
        seconds = float(self.timings["decode_ms"]) / 1e3
        return max(int(self.usage["completion_tokens"]) - 1, 0) / max(seconds, 1e-3)


Piece = Accepted | Waiting | Delta | Done


def new_id() -> bytes:
    """An id for a request that nobody has made before."""
    return os.urandom(len(NO_REQUEST))


def refusal(message: Message) -> RequestError:
    """What an ERROR says."""
    return RequestError(message.body["code"], message.body["message"], message.body["detail"])


class Answer:
    """One request and what has come of it; `texts` are the deltas in order, `session` is the one in which it was asked."""

    def __init__(self, asked: dict[str, Any], session: bytes) -> None:
        self.request, self.session = new_id(), session
        self.texts: list[str] = []
        self.num_deltas = self.num_unattached = 0
        self.is_cancelled = self.is_over = self.is_anew = False
        self._asked = asked
        self._ids: list[tuple[int, ...]] = []
        self._is_accepted = False

    def submit(self) -> Message:
        """The SUBMIT that asks for it."""
        return Message(Kind.SUBMIT, self.request, {**self._asked, "session": self.session})

    def resubmit(self) -> Message:
        """The SUBMIT that asks for the rest of it."""
        return Message(Kind.SUBMIT, self.request, {**self.submit().body, "have": len(self.texts)})

    def begin_anew(self, session: bytes) -> None:
        """Be asked of a daemon that knows nothing of it; raises `ServeError` if there are words of it already."""
        if self.is_cancelled:
            raise self._cancelled()
        if self.texts:
            raise ServeError("the connection was broken for too long, the rest of the answer is lost; try again")
        self.is_anew = True
        # The old id may be known to the daemon, as that of a client that has gone.
        self.request, self.session = new_id(), session

    def take(self, message: Message) -> Piece | None:
        """What a message brings, None if nothing; raises `RequestError` where it ends the request without a `Done`."""
        body = message.body
        if message.request != self.request:
            # The tail of an answer that was abandoned.
            return None
        self.is_over = message.kind in (Kind.ERROR, Kind.DONE)
        if message.kind is Kind.ERROR:
            raise refusal(message)
        if message.kind is Kind.PROGRESS:
            return Waiting(body["stage"], body["done"], body["total"])
        if message.kind is Kind.ACCEPTED:
            return self._accept(body)
        if message.kind is Kind.DELTA:
            self.num_deltas += 1
            text, ids = self.add(body.get("n", len(self.texts)), body["text"], tuple(body.get("ids", ())))
            return None if self.is_cancelled else Delta(text, body["tokens"], ids)
        if message.kind is Kind.DONE:
            return self._finish(body)
        return None

    def add(self, number: int, text: str, ids: tuple[int, ...] = ()) -> tuple[str, tuple[int, ...]]:
        """What is new of a delta: after a broken connection it may repeat some. Raises `ServeError` if one is missing."""
        if number > len(self.texts):
            raise ServeError(f"part {len(self.texts)} of the answer is missing; try again")
        known, num_known_ids = "".join(self.texts[number:]), sum(map(len, self._ids[number:]))
        if not text.startswith(known):
            raise ServeError("the daemon has forgotten the answer and began another; try again")
        self.texts[number:], self._ids[number:] = [text], [ids]
        return text.removeprefix(known), ids[num_known_ids:]

    def _accept(self, body: dict[str, Any]) -> Accepted | None:
        # Said again before the rest of an answer.
        if self._is_accepted:
            return None
        self._is_accepted = True
        sampling = {name: body[name] for name in SAMPLING if name in body}
        return Accepted(body.get("position", 0), body["prompt_tokens"], body["max_tokens"], body["adapter"], sampling)

    def _finish(self, body: dict[str, Any]) -> Done:
        if self.is_cancelled:
            # Words that came after the cancel were left out.
            raise self._cancelled()
        if hashlib.sha256("".join(self.texts).encode()).hexdigest() != body["digest"]:
            raise ServeError("the answer was damaged on its way; try again")
        return Done(body["reason"], body["usage"], body["timings"], body["digest"], body.get("stop", ""))

    def _cancelled(self) -> RequestError:
        return RequestError(Code.CANCELLED, "cancelled", {})
