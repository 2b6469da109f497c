"""A terminal that cannot draw, or shall not (TERM=dumb, NO_COLOR): nothing is drawn twice, and no escape is written."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence

from serve.chat.keyboard import own_keyboard
from serve.chat.printable import printable
from serve.chat.screen import PROMPT, Lines


class PlainScreen(Lines):
    """Lines in, lines out. The terminal itself edits the line that is typed."""

    has_colour = False

    def __init__(self, on_line: Callable[[str], bool], on_interrupt: Callable[[], None]) -> None:
        """See `LiveScreen`."""
        super().__init__(on_line)
        self._on_interrupt = on_interrupt
        self._left = asyncio.Event()
        self._offered = ""
        self._is_prompted = False

    async def run(self) -> None:
        """Until the user leaves."""
        loop = asyncio.get_running_loop()
        with own_keyboard(self._interrupt, is_drawn=False):
            loop.add_reader(sys.stdin, self._read)
            await self._left.wait()
            loop.remove_reader(sys.stdin)

    async def line(self) -> str:
        """The next line that was typed; the prompt shows that it is awaited."""
        return await (super().line() if self.num_waiting else self._prompted(super().line()))

    async def choice(self) -> str:
        """See `Screen.choice`."""
        return await self._prompted(super().choice())

    async def _prompted(self, line: Awaitable[str]) -> str:
        self._write(PROMPT)
        self._is_prompted = True
        try:
            return await line
        finally:
            self._is_prompted = False

    def print(self, rows: Iterable[str]) -> None:
        """Rows that are finished."""
        for row in rows:
            self._write(f"{row}\n")
        if self._is_prompted and not self._left.is_set():
            self._write(PROMPT)

    def show(self, live: Sequence[str]) -> None:
        """Nothing: it would have to be drawn again."""

    def prefill(self, text: str) -> None:
        """Offer it, once: the line of this terminal is not ours, so an empty one stands for it."""
        if text != self._offered:
            self._write(f"[Enter] {printable(text)}\n")
        self._offered = text

    def leave(self) -> None:
        """End `run`."""
        self._left.set()

    def _interrupt(self) -> None:
        # Behind the ^C that the terminal wrote.
        self._write("\n")
        self._on_interrupt()

    def _read(self) -> None:
        # The terminal gives whole lines.
        data = os.read(sys.stdin.fileno(), 2**16)
        text = data.decode("utf-8", "replace").removesuffix("\n") or self._offered
        self._offered = ""
        if not data:
            self.leave()
        else:
            self.put(text)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
