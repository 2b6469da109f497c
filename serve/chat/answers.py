"""Answers under way: one, or several side by side, shown in the order in which they were asked for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.chat.markdown import Markdown
from serve.chat.phrases import say
from serve.chat.screen import Screen, width
from serve.chat.width import Span, cells, columns
from serve.client import Client
from serve.errors import RequestError, ServeError
from serve.pieces import Accepted, Delta, Done, Piece
from serve.protocol import Code

STYLE = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Outcome:
    """How an answer ended: with `done`, with a `fault`, or with neither where it was cancelled."""

    texts: list[str] = field(default_factory=list)
    adapter: str = ""
    done: Done | None = None
    fault: ServeError | None = None

    @property
    def text(self) -> str:
        """All that came."""
        return "".join(self.texts)


async def collect(
    client: Client, messages: list[dict[str, Any]], options: dict[str, Any], on_piece: Callable[[Piece], None]
) -> Outcome:
    """Ask, and take what comes; never raises what the user should read."""
    outcome = Outcome()
    try:
        async for piece in client.ask(messages, **options):
            if isinstance(piece, Accepted):
                outcome.adapter = piece.adapter
            elif isinstance(piece, Delta):
                outcome.texts.append(piece.text)
            elif isinstance(piece, Done):
                outcome.done = piece
            on_piece(piece)
    except ServeError as fault:
        if not (isinstance(fault, RequestError) and fault.code == Code.CANCELLED):
            outcome.fault = fault
    return outcome


class Shown:
    """Several answers on one screen. The first streams; the others wait for their turn, and are counted meanwhile."""

    def __init__(self, screen: Screen, heads: Sequence[str]) -> None:
        """`heads` names each answer above it, "" for none."""
        self._screen, self._heads = screen, heads
        self._texts = [Markdown(width, has_colour=screen.has_colour) for _ in heads]
        self._held: list[list[str]] = [[] for _ in heads]
        self._tokens = [0] * len(heads)
        self._is_over = [False] * len(heads)
        # Whose rows are printed as they come.
        self.streaming = 0
        self._begin()

    def add(self, number: int, piece: Delta) -> None:
        """The next piece of an answer."""
        self._tokens[number] = piece.tokens
        self._out(number, self._texts[number].feed(piece.text))

    def end(self, number: int, note: str) -> None:
        """An answer is over, with a note behind it or ""."""
        rows = self._texts[number].finish()
        if note and rows and columns(cells([Span(STYLE.sub("", f"{rows[-1]} {note}"))])) <= width():
            rows[-1] += f" {note}"
        elif note:
            rows.append(note)
        self._is_over[number] = True
        self._out(number, rows)
        while self.streaming < len(self._heads) and self._is_over[self.streaming]:
            self.streaming += 1
            self._begin()
        self._show()

    def _begin(self) -> None:
        if self.streaming < len(self._heads):
            head = self._heads[self.streaming]
            self._screen.print([*([f"── {head}"] if head else []), *self._held[self.streaming]])

    def _out(self, number: int, rows: list[str]) -> None:
        if number != self.streaming:
            self._held[number] += rows
        elif rows:
            self._screen.print(rows)
        self._show()

    def _show(self) -> None:
        live = self._texts[self.streaming].live if self.streaming < len(self._heads) else []
        others = [
            f"── {head}: {say('num_tokens', number=tokens)}"
            for head, tokens, is_over in list(zip(self._heads, self._tokens, self._is_over, strict=True))[
                self.streaming + 1 :
            ]
            if not is_over
        ]
        self._screen.show([*live, *others])
