"""Asking, of one or of several: until the question fits, and the answers end, fail or are stopped."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

from serve.chat.answers import Outcome, Shown, collect
from serve.chat.conversation import ending
from serve.chat.conversation_events import Answer, Edit, Others, Regenerate, User
from serve.chat.phrases import say
from serve.chat.room import make_room
from serve.chat.sampling import options_of
from serve.chat.talk import Talk
from serve.client import Client, connect
from serve.engine import BASE
from serve.errors import NoDaemonError, RequestError, ServeError
from serve.pieces import Accepted, Delta, Done, Piece, Waiting
from serve.protocol import Code


async def exchange(talk: Talk, event: User | Edit | Regenerate, again: str, names: Sequence[str] = ()) -> None:
    """Ask, of who answers anyway or of several, and show it; afterwards the turns alternate, whatever happened.

    `again` is the line that asks the same once more: it is offered if not a word comes, or the daemon goes.
    """
    asking = Asking(talk, names or [talk.adapter])
    fault: ServeError | None = None
    try:
        await talk.connected()
        talk.happen(event)
        fault = await asking.until_it_fits()
    finally:
        # Also where Ctrl-C ended the search for a daemon, or the choice of what to leave out.
        if talk.conversation.open_question is not None:
            asking.close()
        if not asking.is_answered:
            talk.screen.prefill(again)
    if isinstance(fault, NoDaemonError):
        has_words = asking.is_answered and not isinstance(event, Regenerate)
        await talk.come_back("/regenerate" if has_words else again)
    elif not asking.is_answered:
        # What was counted with the question is counted without it.
        await talk.recount()


class Asking:
    """One question on its way to those of these names."""

    def __init__(self, talk: Talk, names: Sequence[str]) -> None:
        self._talk, self._names = talk, list(names)
        self._outcomes: list[Outcome] = []
        # Of each answer: when its first token came, and how many there were before it.
        self._begun, self._before = [0.0] * len(names), [0] * len(names)

    @property
    def is_answered(self) -> bool:
        """Whether a word came, or the end of an answer without any."""
        return any(outcome.texts or outcome.done for outcome in self._outcomes)

    async def until_it_fits(self) -> ServeError | None:
        """Ask, again where room was made; the fault that ended it, which has been shown."""
        while True:
            self._outcomes = await self._ask()
            faults = [outcome.fault for outcome in self._outcomes if outcome.fault]
            if not faults:
                return None
            # Who answered is not asked again because another one's context is smaller.
            if len(faults) < len(self._names) or not all(map(_is_too_long, faults)):
                self._tell(faults)
                return next((fault for fault in faults if isinstance(fault, NoDaemonError)), faults[0])
            assert isinstance(faults[0], RequestError)
            if not await make_room(self._talk, faults[0].detail):
                return faults[0]

    def close(self) -> None:
        """One answer ends the exchange."""
        talk, kept = self._talk, self._kept()
        outcome = self._outcomes[kept] if self._outcomes else Outcome()
        usage = dict(outcome.done.usage) if outcome.done else {}
        is_interrupted = outcome.done is None
        talk.happen(ending(outcome.text, is_interrupted=is_interrupted, adapter=outcome.adapter, usage=usage))
        others = {
            other.adapter or name: other.text
            for name, other in zip(self._names, self._outcomes, strict=False)
            if other is not outcome and (other.texts or other.done)
        }
        if others and isinstance(talk.conversation.events[-1], Answer):
            talk.happen(Others(others))
            talk.tell("kept", name=self._names[kept])
        if outcome.done:
            talk.last = outcome.done
            talk.used = outcome.done.usage["prompt_tokens"] + outcome.done.usage["completion_tokens"]
            talk.rate = outcome.done.tokens_per_second

    def _kept(self) -> int:
        """Whose answer is kept: of who answers anyway, or else the first; if that has no word, the first that has."""
        keys = [self._talk.key(name) for name in self._names]
        usual = self._talk.key(self._talk.adapter)
        wanted = keys.index(usual) if usual in keys else 0
        spoken = [number for number, outcome in enumerate(self._outcomes) if outcome.texts]
        return spoken[0] if spoken and wanted not in spoken else wanted

    def _tell(self, faults: Sequence[ServeError]) -> None:
        """Each fault once, with the names of those that it befell where several were asked."""
        for text in dict.fromkeys(map(str, faults)):
            names = [n for n, o in zip(self._names, self._outcomes, strict=True) if o.fault and str(o.fault) == text]
            is_common = len(names) == len(self._names)
            self._talk.tell("error", text=text if is_common else f"{', '.join(names)}: {text}")

    async def _ask(self) -> list[Outcome]:
        """The answers of all of them, side by side."""
        talk, names = self._talk, self._names
        talk.is_stopped = False
        with contextlib.ExitStack() as more:
            clients = [talk.client]
            for _ in names[1:]:
                clients.append(more.enter_context(await connect(talk.client.record)))
            shown = Shown(talk.screen, names if len(names) > 1 else [""])
            with talk.asking(clients):
                asked = [self._ask_one(shown, i, clients[i], self._messages(i)) for i in range(len(names))]
                return list(await asyncio.gather(*asked))

    def _messages(self, number: int) -> list[dict[str, Any]]:
        """What one of them reads. The base, which was trained with no system turn, reads that of who is beside it."""
        talk, names = self._talk, self._names
        messages: list[dict[str, Any]] = list(talk.conversation.messages())
        beside = next((name for name in names if name != BASE), BASE)
        is_own = names[number] != BASE or talk.conversation.system or not talk.key(beside)
        return messages if is_own else talk.require_adapter(beside).as_trained(messages)

    async def _ask_one(self, shown: Shown, number: int, client: Client, messages: list[dict[str, Any]]) -> Outcome:
        talk, outcome = self._talk, Outcome()
        # Ctrl-C may have come before the question is on its way.
        if not talk.is_stopped:
            options = {**options_of(talk.conversation.params), "adapter": self._names[number]}
            outcome = await collect(client, messages, options, lambda piece: self._follow(shown, number, piece))
        is_heard = bool(outcome.texts) or outcome.fault is None
        shown.end(number, say("interrupted") if outcome.done is None and is_heard else self._cut(outcome.done))
        return outcome

    def _follow(self, shown: Shown, number: int, piece: Piece) -> None:
        if isinstance(piece, Accepted):
            self._before[number] = piece.prompt_tokens
        elif isinstance(piece, Delta):
            self._begun[number] = self._begun[number] or time.monotonic()
            shown.add(number, piece)
        if number == shown.streaming:
            self._count(number, piece)

    def _count(self, number: int, piece: Piece) -> None:
        """What the toolbar says of the answer that streams."""
        talk = self._talk
        if isinstance(piece, Accepted):
            talk.used = piece.prompt_tokens
        elif isinstance(piece, Waiting):
            is_queued = piece.stage == "queued"
            talk.state = (
                say("queued", number=piece.done) if is_queued else say("reading", done=piece.done, total=piece.total)
            )
            talk.screen.show([])
        elif isinstance(piece, Delta):
            talk.state = say("answering")
            talk.used = self._before[number] + piece.tokens
            talk.rate = (piece.tokens - 1) / max(time.monotonic() - self._begun[number], 1e-3)

    def _cut(self, done: Done | None) -> str:
        """A note for an answer that was ended by a limit."""
        if done is None or done.reason != "length":
            return ""
        used = done.usage["prompt_tokens"] + done.usage["completion_tokens"]
        return f"[{say('answer_full') if used >= self._talk.context else 'max_tokens'}]"


def _is_too_long(fault: ServeError) -> bool:
    return isinstance(fault, RequestError) and fault.code == Code.CONTEXT
