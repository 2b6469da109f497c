"""The two kinds of terminals behind one face: what is said is printed once, lines that are typed come out in order.

On an able terminal the prompt is there all the time, also while an answer streams above it: what is finished scrolls away, only
the tail of the answer, the prompt and the toolbar are drawn again. On a plain one nothing is ever drawn again, and no
escape is written.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import Completer
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, is_done
from prompt_toolkit.formatted_text import ANSI, StyleAndTextTuples, to_formatted_text
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import ConditionalContainer, FormattedTextControl, HSplit, Window
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from serve.chat.keyboard import own_keyboard
from serve.chat.printable import printable
from serve.chat.width import Span, cells, paint, wrapped

PROMPT = "> "
# Often enough for an eye, seldom enough for a processor; a key is echoed within this time.
REDRAW_SECONDS = 0.02
MENU_ROWS = 6


class Screen(Protocol):
    """Where a conversation is seen and typed."""

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
        """`on_line` may take a line at once (True), before those that wait."""
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
        if self._choice is not None and not self._choice.done():
            self._choice.set_result(text)
        elif not self._on_line(text):
            self._waiting.put_nowait(text)


class LiveScreen(Lines):
    """A terminal that can draw."""

    has_colour = True

    def __init__(
        self,
        history: str,
        completer: Completer,
        toolbar: Callable[[], str],
        on_line: Callable[[str], bool],
        on_interrupt: Callable[[], None],
    ) -> None:
        """`on_interrupt` is Ctrl-C at an empty prompt."""
        super().__init__(on_line)
        self._live: list[str] = []
        self._held: list[str] = []
        self._is_away = False
        self._on_interrupt = on_interrupt
        self._output = Vt100_Output.from_pty(sys.stdout, term=os.environ.get("TERM"))
        # Asking the terminal where the cursor is would cost a round trip for every row.
        self._output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            self._message,
            history=FileHistory(history),
            auto_suggest=AutoSuggestFromHistory(),
            completer=completer,
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            complete_style=CompleteStyle.COLUMN,
            reserve_space_for_menu=MENU_ROWS,
            prompt_continuation="  ",
            key_bindings=self._keys(),
            erase_when_done=True,
            output=self._output,
        )
        self._session.default_buffer.accept_handler = self._accept
        app = self._session.app
        app.min_redraw_interval = REDRAW_SECONDS
        # The session's own toolbar waits until the terminal has said where the cursor is.
        bar = Window(FormattedTextControl(lambda: toolbar()[: width()]), height=1, style="class:bottom-toolbar")
        app.layout.container = HSplit([app.layout.container, ConditionalContainer(bar, ~is_done)])

    async def run(self) -> None:
        """Until the user leaves."""
        with own_keyboard(self._interrupt), contextlib.suppress(EOFError):
            await self._session.prompt_async(handle_sigint=False)

    def print(self, rows: Iterable[str]) -> None:
        """Rows that are finished."""
        self._held += rows
        app = self._session.app
        if not self._held or self._is_away:
            return
        text = "".join(f"{row}\r\n" for row in self._held)
        self._held = []
        if app.is_running:
            app.renderer.erase()
        self._output.write_raw(text)
        self._output.flush()
        app.invalidate()

    def show(self, live: Sequence[str]) -> None:
        """The rows that are not finished."""
        self._live = list(live)
        self._session.app.invalidate()

    def prefill(self, text: str) -> None:
        """Put text into an empty prompt."""
        if not self._session.default_buffer.text:
            self._session.default_buffer.document = Document(text)
            self._session.app.invalidate()

    def leave(self) -> None:
        """End `run`."""
        if self._session.app.is_running:
            self._session.app.exit(exception=EOFError)

    def _message(self) -> StyleAndTextTuples:
        live = "".join(f"{row}\n" for row in self._live)
        return [*to_formatted_text(ANSI(live)), ("bold", PROMPT)]

    def _accept(self, buffer: object) -> bool:
        # A pasted byte that is no UTF-8 arrives as a lone surrogate, which no message can carry.
        text = self._session.default_buffer.text.encode("utf-8", "replace").decode()
        first, *others = printable(text).split("\n")
        self.print([f"\x1b[1m{PROMPT}\x1b[0m{first}", *(f"  {row}" for row in others)])
        self.put(text)
        return False

    def _interrupt(self) -> None:
        if self._session.default_buffer.text:
            self._session.default_buffer.reset()
        else:
            self._on_interrupt()

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            self._interrupt()

        @keys.add("c-x", "c-e")
        def _(event: KeyPressEvent) -> None:
            # What comes meanwhile must not be written over the editor.
            self._is_away = True
            event.current_buffer.open_in_editor().add_done_callback(lambda _: self._return())

        return keys

    def _return(self) -> None:
        self._is_away = False
        self.print([])


class PlainScreen(Lines):
    """A terminal that cannot draw, or shall not: TERM=dumb, NO_COLOR."""

    has_colour = False

    def __init__(self, on_line: Callable[[str], bool], on_interrupt: Callable[[], None]) -> None:
        """See `LiveScreen`."""
        super().__init__(on_line)
        self._on_interrupt = on_interrupt
        self._left = asyncio.Event()
        self._offered = ""

    async def run(self) -> None:
        """Until the user leaves."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        loop.add_reader(sys.stdin, self._read)
        await self._left.wait()
        loop.remove_reader(sys.stdin)

    async def line(self) -> str:
        """The next line that was typed; the prompt shows that it is awaited."""
        if not self.num_waiting:
            self._write(PROMPT)
        return await super().line()

    async def choice(self) -> str:
        """See `Screen.choice`."""
        self._write(PROMPT)
        return await super().choice()

    def print(self, rows: Iterable[str]) -> None:
        """Rows that are finished."""
        for row in rows:
            self._write(f"{row}\n")

    def show(self, live: Sequence[str]) -> None:
        """Nothing: it would have to be drawn again."""

    def prefill(self, text: str) -> None:
        """Offer it: the line of this terminal is not ours, so an empty one stands for it."""
        self._offered = text
        self._write(f"[Enter] {printable(text)}\n")

    def leave(self) -> None:
        """End `run`."""
        self._left.set()

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


def prose(text: str) -> list[str]:
    """Our own words as rows that fit."""
    return [
        paint(row, has_colour=False)
        for line in printable(text).split("\n")
        for row in wrapped(cells([Span(line)]), width())
    ]


def width() -> int:
    """Columns for text: the last one is left free, where terminals differ in what they do."""
    return max(shutil.get_terminal_size().columns - 1, 8)
