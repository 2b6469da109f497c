"""The two kinds of terminals behind one face: what is said is printed once, lines that are typed come out in order.

On an able terminal the prompt is there all the time, also while an answer streams above it: what is finished scrolls away, only
the tail of the answer, the prompt and the toolbar are drawn again. On a plain one nothing is ever drawn again, and no
escape is written.
"""

import asyncio
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from serve.chat.printable import printable
from serve.chat.width import Span, cells, cut, paint, wrapped

PROMPT = "> "


class Screen(Protocol):
    """Where a conversation is seen and typed."""

    # Whether escapes may be written to it, be it for colour or for its clipboard.
    has_colour: bool

    @property
    def num_waiting(self) -> int:
        """Lines that were typed and not taken yet."""
        ...

    async def run(self) -> None:
        """Until the user leaves."""
        ...

    async def line(self) -> str:
        """The next line that was typed."""
        ...

    async def choice(self) -> str:
        """The next line that is typed from now on: one that waits already was not meant for what was just asked."""
        ...

    def forget(self) -> int:
        """Drop the lines that wait; how many there were."""
        ...

    def print(self, rows: Iterable[str]) -> None:
        """Rows that are finished, above the prompt; they are made of printable text and SGR escapes."""
        ...

    def show(self, live: Sequence[str]) -> None:
        """The rows that are not finished, in place of those before."""
        ...

    def prefill(self, text: str) -> None:
        """Put text into an empty prompt, to be changed or entered."""
        ...

    def leave(self) -> None:
        """End `run`."""
        ...


class Lines:
    """The lines that were typed, in order; or the one that was just asked for."""

    def __init__(self, on_line: Callable[[str], bool]) -> None:
        """`on_line` may take a line at once (True), before those that wait, and before a choice."""
        self._waiting: asyncio.Queue[str] = asyncio.Queue()
        self._choice: asyncio.Future[str] | None = None
        self._on_line = on_line

    @property
    def num_waiting(self) -> int:
        """Lines that were typed and not taken yet."""
        return self._waiting.qsize()

    async def line(self) -> str:
        """See `Screen.line`."""
        return await self._waiting.get()

    async def choice(self) -> str:
        """See `Screen.choice`."""
        self._choice = asyncio.get_running_loop().create_future()
        try:
            return await self._choice
        finally:
            self._choice = None

    def put(self, text: str) -> None:
        """A line was typed."""
        if self._on_line(text):
            return
        if self._choice is not None and not self._choice.done():
            self._choice.set_result(text)
        else:
            self._waiting.put_nowait(text)

    def forget(self) -> int:
        """See `Screen.forget`."""
        number = self.num_waiting
        while self.num_waiting:
            self._waiting.get_nowait()
        return number


def prose(text: str) -> list[str]:
    """Our own words as rows that fit."""
    return [
        paint(row, has_colour=False)
        for line in printable(text).split("\n")
        for row in wrapped(cells([Span(line)]), width())
    ]


def clipped(text: str) -> str:
    """One row of a list: what fits of it."""
    return paint(cut(cells([Span(printable(text))]), width())[0], has_colour=False)


def width() -> int:
    """Columns for text: the last one is left free, where terminals differ in what they do."""
    return max(shutil.get_terminal_size().columns - 1, 8)
