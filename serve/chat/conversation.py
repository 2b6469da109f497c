"""A conversation: what happened, as events, and what stands because of them. Pure.

An exchange is a question and its answer. Only the last one may lack its answer: its question is open. So the turns alternate
whatever happens. Nothing that was said is destroyed: what is undone, replaced or dropped stays in the events.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from serve.chat.conversation_events import (
    Adapter,
    Answer,
    Begin,
    Drop,
    Edit,
    Event,
    Others,
    Params,
    Regenerate,
    Reset,
    Summary,
    System,
    Undo,
    User,
    Withdraw,
)

# In front of the first question that is sent: not every chat template knows a system turn.
SUMMARY_LEAD = "Earlier in this conversation: "


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, None while it is open; `before` is what a withdrawal brings back."""

    question: str
    answer: Answer | None = None
    others: dict[str, str] = field(default_factory=dict)
    before: "Exchange | None" = None


@dataclass
class Conversation:
    """What stands. Changed by `apply` alone; the first `num_dropped` exchanges are no longer sent."""

    events: list[Event] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    run: str = ""
    model: str = ""
    adapter: str = ""
    system: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    num_dropped: int = 0
    summary: str = ""

    @property
    def open_question(self) -> str | None:
        """The question that waits for its answer."""
        return self.exchanges[-1].question if self.exchanges and self.exchanges[-1].answer is None else None

    @property
    def num_exchanges(self) -> int:
        """How many questions stand with their answers."""
        return len(self.exchanges) - (self.open_question is not None)

    def messages(self) -> list[dict[str, str]]:
        """What is sent. That an answer was interrupted is for the eye, the model reads only its words."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for number, exchange in enumerate(self.exchanges[self.num_dropped :]):
            lead = f"{SUMMARY_LEAD}{self.summary}\n\n" if self.summary and not number else ""
            messages.append({"role": "user", "content": lead + exchange.question})
            if exchange.answer:
                messages.append({"role": "assistant", "content": exchange.answer.text})
        return messages

    def problem(self, event: Event) -> str:
        """Why `event` cannot happen now, "" if it can."""
        is_open = self.open_question is not None
        match event:
            case User() if is_open:
                return "a question is open already"
            case Answer() | Withdraw() if not is_open:
                return "no question is open"
            case Answer(text="", is_interrupted=True):
                return "an interrupted answer has a word at least; its question is withdrawn"
            case Undo() | Regenerate() | Others() if is_open or not self.exchanges:
                return "the last turn is no answer"
            case Edit() if not self.exchanges:
                return "there is no question to edit"
            case Drop(count) if not 0 < count <= self.num_exchanges - self.num_dropped:
                return f"{self.num_exchanges - self.num_dropped} exchanges can be dropped, not {count}"
            case Summary() if not self.num_dropped:
                return "nothing is dropped that a summary could stand for"
        return ""

    def apply(self, event: Event) -> None:
        """Let it happen; an event that cannot is a bug of ours (`AssertionError`)."""
        problem = self.problem(event)
        assert not problem, problem
        self.events.append(event)
        if not self._set(event):
            self._turn(event)
        # An undone exchange may have been a dropped one, and a question that is open again must be sent.
        self.num_dropped = min(self.num_dropped, self.num_exchanges)
        if not self.num_dropped:
            self.summary = ""

    def _set(self, event: Event) -> bool:
        """Whether it was an event that leaves the exchanges alone."""
        match event:
            case Begin(run, model, adapter):
                self.run, self.model, self.adapter = run, model, adapter
            case System(text):
                self.system = text
            case Drop(count):
                self.num_dropped += count
            case Summary(text):
                self.summary = text
            case Adapter(name):
                self.adapter = name
            case Params(values):
                self.params = values
            case _:
                return False
        return True

    def _turn(self, event: Event) -> None:
        if isinstance(event, User):
            self.exchanges.append(Exchange(event.text))
            return
        if isinstance(event, Reset):
            self.exchanges.clear()
            return
        last = self.exchanges.pop()
        before = last if last.answer else last.before
        match event:
            case Answer():
                self.exchanges.append(Exchange(last.question, event))
            case Withdraw() if before:
                self.exchanges.append(before)
            case Edit(text):
                self.exchanges.append(Exchange(text, before=before))
            case Regenerate():
                self.exchanges.append(Exchange(last.question, before=before))
            case Others(answers):
                self.exchanges.append(dataclasses.replace(last, others=answers))


def replay(events: Iterable[Event]) -> Conversation:
    """The conversation in which these events happened; raises `ValueError` at the first that could not."""
    conversation = Conversation()
    for event in events:
        if problem := conversation.problem(event):
            raise ValueError(problem)
        conversation.apply(event)
    return conversation


def ending(
    text: str, *, is_interrupted: bool, adapter: str = "", usage: dict[str, Any] | None = None
) -> Answer | Withdraw:
    """How an open question ends, now that `text` is what came: it is withdrawn if an interruption left not a word."""
    return Withdraw() if is_interrupted and not text else Answer(text, is_interrupted, adapter, usage or {})


def count_exchanges(kinds: Iterable[str]) -> int:
    """`Conversation.num_exchanges` from the kinds of the events alone, for lists that must not read all."""
    done = before = 0
    is_open = False
    for kind in kinds:
        if kind == "user":
            before, is_open = done, True
        elif kind in ("edit", "regenerate") and not is_open:
            before, done, is_open = done, done - 1, True
        elif kind == "answer":
            done, is_open = done + 1, False
        elif kind == "withdraw":
            done, is_open = before, False
        elif kind == "undo":
            done -= 1
        elif kind == "reset":
            done = 0
    return done
