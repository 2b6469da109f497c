"""What a client asks besides answers: tokens of a conversation, adapters, and for who may, loading and leaving.

These questions go to the engines and their replies come back to who asked; an adapter is loaded everywhere or nowhere.
"""

import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve import runs
from serve.errors import UserError
from serve.fleet import Fleet
from serve.open_requests import Lane, Sent
from serve.protocol import ADMIN, NO_REQUEST, Code, Kind, Message, encode, error

# A question whose asker or engine is gone is dropped after so long.
PATIENCE_SECONDS = 300.0
# So many questions of one client may wait for an engine: each takes of the time between two tokens of everybody's.
MAX_QUESTIONS = 8
# What all of them may take together; a short one counts as so much.
MAX_QUESTION_BYTES = 16 * 2**20
LEAST_QUESTION_BYTES = 64 * 2**10
RETRY_MS = 500
# What an engine needs of a question; it need not know the token.
ASKED = ("messages", "adapter", "run")


@dataclass
class Question:
    """Who asked what, and which engines have not replied. Engines know it by an id that the daemon drew."""

    asker: bytes
    kind: Kind
    request: bytes
    num_bytes: int
    engines: set[int]
    run: str = ""
    done: list[int] = field(default_factory=list)
    fault: Message | None = None
    reply: Message | None = None
    asked: float = field(default_factory=time.monotonic)


class Administration:
    """See the module; `admin` is the token that LOAD, UNLOAD, DRAIN and SHUTDOWN must carry."""

    def __init__(
        self,
        send: Callable[[Lane, bytes, Message], Sent],
        forward: Callable[[int, Message], None],
        fleet: Fleet,
        admin: str,
        status: Callable[[], dict[str, Any]],
        on_leave: Callable[[bool], None],
        log: Callable[..., None],
    ) -> None:
        self._send, self._forward, self._fleet, self._admin = send, forward, fleet, admin
        self._status, self._on_leave, self._log = status, on_leave, log
        self._questions: dict[bytes, Question] = {}
        # The runs that are wanted, by name: what the first engine began with and was loaded since, less what was unloaded.
        self.runs: dict[str, str] = {}
        self._has_begun = False

    def on_control(self, sender: bytes, message: Message) -> bool:
        """Take a message of a client; False if it is none of these."""
        if message.kind in ADMIN and not self._may(message):
            text = "only who started the daemon may do that; try it as that user, on that machine"
            self._send(Lane.CONTROL, sender, error(message.request, Code.AUTH, text))
        elif message.kind in (Kind.DRAIN, Kind.SHUTDOWN):
            self._send(Lane.CONTROL, sender, Message(Kind.STATUS, message.request, self._status()))
            self._on_leave(message.kind is Kind.SHUTDOWN)
        elif message.kind is Kind.ADAPTERS:
            self._send(Lane.CONTROL, sender, Message(Kind.ADAPTERS, message.request, self._adapters()))
        elif message.kind in (Kind.TOKENIZE, Kind.LOAD, Kind.UNLOAD):
            self._ask(sender, message)
        else:
            return False
        return True

    def _may(self, message: Message) -> bool:
        token = message.body.get("admin")
        return (
            bool(self._admin) and isinstance(token, str) and hmac.compare_digest(token.encode(), self._admin.encode())
        )

    def _adapters(self) -> dict[str, Any]:
        return {"adapters": [{**vars(adapter), "key": adapter.key} for adapter in self._fleet.first.adapters]}

    def _ask(self, sender: bytes, message: Message) -> None:
        now = time.monotonic()
        self._questions = {i: q for i, q in self._questions.items() if now - q.asked < PATIENCE_SECONDS}
        # Not by the id that the asker chose: it may be that of a request of somebody else's.
        inner = secrets.token_bytes(len(NO_REQUEST))
        question = Message(message.kind, inner, {key: message.body[key] for key in ASKED if key in message.body})
        num_bytes = max(len(encode(question)[-1]), LEAST_QUESTION_BYTES)
        if refusal := self._refusal(sender, message, num_bytes):
            self._send(Lane.CONTROL, sender, refusal)
            return
        asked = self._asked(message)
        run = message.body.get("run", "")
        self._questions[inner] = Question(sender, message.kind, message.request, num_bytes, asked, run)
        for number in asked:
            self._forward(number, question)

    def _asked(self, message: Message) -> set[int]:
        """Which engines a question is for."""
        ready = set(self._fleet.ready)
        if message.kind is Kind.TOKENIZE:
            return {min(ready)}
        if message.kind is Kind.UNLOAD:
            # An engine that could not load an adapter again need not unload it.
            name = message.body["adapter"].partition("@")[0]
            return {number for number in ready if name in self._runs_at(number)} or ready
        return ready

    def _refusal(self, sender: bytes, message: Message, num_bytes: int) -> Message | None:
        """Why this question cannot be asked now, if so."""
        if not self._fleet.ready:
            return error(message.request, Code.LOADING, "no engine is ready yet; try again in a moment")
        if message.kind is Kind.LOAD:
            try:
                runs.check_name(message.body["run"])
            except UserError as fault:
                return error(message.request, Code.ADAPTER_INCOMPATIBLE, str(fault))
        own = sum(question.asker == sender for question in self._questions.values())
        taken = sum(question.num_bytes for question in self._questions.values())
        for have, more, most, whose in (
            (own, 1, MAX_QUESTIONS, " of yours"),
            (taken, num_bytes, MAX_QUESTION_BYTES, ""),
        ):
            if have + more > most:
                text = f"too many questions{whose} at once; try again in {RETRY_MS / 1e3:.1f} s"
                counts = {"waiting": have, "max": most, "retry_after_ms": RETRY_MS}
                return error(message.request, Code.QUEUE_FULL, text, **counts)
        return None

    def on_engine(self, number: int, message: Message) -> bool:
        """Take an engine's reply, or its news of adapters; False if it is about a request."""
        if message.kind is Kind.ADAPTERS:
            self._fleet.engines[number].info = message.body["info"]
        elif message.kind is Kind.ERROR and message.request == NO_REQUEST:
            self._log("engine refused", engine=number, code=message.body["code"], why=message.body["message"])
        question = self._questions.get(message.request)
        if question is None or number not in question.engines:
            return message.kind in (Kind.ADAPTERS, Kind.TOKENIZE) or message.request == NO_REQUEST
        question.engines.discard(number)
        if message.kind is Kind.ERROR:
            question.fault = question.fault or message
        else:
            question.done.append(number)
            question.reply = message
        if not question.engines:
            self._answer(self._questions.pop(message.request))
            if question.kind is not Kind.TOKENIZE:
                self._level_all()
        return True

    def engine_died(self, number: int, why: str) -> None:
        """It will not reply any more."""
        for inner in [i for i, question in self._questions.items() if number in question.engines]:
            self.on_engine(number, error(inner, Code.ENGINE, f"{why}; try again"))

    def _answer(self, question: Question) -> None:
        if question.fault is not None:
            reply = Message(Kind.ERROR, question.request, question.fault.body)
        elif question.kind is Kind.TOKENIZE:
            assert question.reply is not None
            reply = Message(question.kind, question.request, question.reply.body)
        else:
            what, key = self._change(question)
            self._log(f"adapter {what}", adapter=key)
            reply = Message(Kind.ADAPTERS, question.request, {**self._adapters(), what: key})
        self._send(Lane.CONTROL, question.asker, reply)

    # What is wanted, and what is there.

    def wanted(self, given: tuple[str, ...]) -> tuple[str, ...]:
        """With which of these an engine shall start; with all where none is left, for they tell the base."""
        paths = {Path(run).absolute() for run in self.runs.values()}
        return tuple(run for run in given if Path(run).absolute() in paths) or given

    def engine_ready(self, number: int) -> None:
        """The first engine tells what there is; the others, and those that start again, follow."""
        if not self._has_begun:
            self._has_begun = True
            self.runs = self._runs_at(number)
        self._level(number)

    def _change(self, question: Question) -> tuple[str, str]:
        """Want what was loaded, and no more what was unloaded: (`loaded` or `unloaded`, the key of the adapter)."""
        assert question.reply is not None
        what = "loaded" if question.kind is Kind.LOAD else "unloaded"
        key = question.reply.body[what]
        name = key.partition("@")[0]
        if question.kind is Kind.LOAD:
            self.runs[name] = question.run
        elif not any(name in self._runs_at(number) for number in question.done):
            self.runs.pop(name, None)
        return what, key

    def _runs_at(self, number: int) -> dict[str, str]:
        """The runs that an engine has, by name."""
        return {adapter.name: adapter.run for adapter in self._fleet.engines[number].adapters if adapter.run}

    def _level_all(self) -> None:
        """After a change: some may have done what others could not, or have become ready in the meantime."""
        # The last of several changes sees to all.
        if all(question.kind is Kind.TOKENIZE for question in self._questions.values()):
            for number in self._fleet.ready:
                self._level(number)

    def _level(self, number: int) -> None:
        """Have an engine load what is wanted and not there, and unload what is there and not wanted."""
        there = self._runs_at(number)
        for name, run in self.runs.items():
            if name not in there:
                self._forward(number, Message(Kind.LOAD, NO_REQUEST, {"run": run}))
        for name in there.keys() - self.runs.keys():
            self._forward(number, Message(Kind.UNLOAD, NO_REQUEST, {"adapter": name}))
