"""A terminal that can draw: the prompt is there all the time, also while an answer streams above it."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import Completer
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, is_done, is_searching
from prompt_toolkit.formatted_text import ANSI, StyleAndTextTuples, to_formatted_text
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import ConditionalContainer, Dimension, FormattedTextControl, HSplit, Window, to_dimension
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from serve.chat.keyboard import own_keyboard
from serve.chat.printable import printable
from serve.chat.screen import PROMPT, Lines, width

# Often enough for an eye, seldom enough for a processor; a key is echoed within this time.
REDRAW_SECONDS = 0.02
MENU_ROWS = 6


class LiveScreen(Lines):
    """A terminal that can draw."""

    has_colour = True

    def __init__(
        self,
        history: History,
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
            history=history,
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
        self._limit_prompt()
        # The session's own toolbar waits until the terminal has said where the cursor is.
        bar = Window(FormattedTextControl(lambda: toolbar()[: width()]), height=1, style="class:bottom-toolbar")
        app.layout.container = HSplit([app.layout.container, ConditionalContainer(bar, ~is_done)])

    def _limit_prompt(self) -> None:
        """Keep a long question from pushing what is said above it off the screen: half of the rows are its own."""
        buffer = self._session.default_buffer
        window = next(
            w for w in self._session.app.layout.find_all_windows() if getattr(w.content, "buffer", 0) is buffer
        )
        wanted = window.height

        def height() -> Dimension:
            most = _most_prompt_rows()
            least = to_dimension(wanted).min
            return Dimension(min=min(least, most), max=most)

        window.height = height

    async def run(self) -> None:
        """Until the user leaves."""
        with own_keyboard(self._interrupt, is_drawn=True), contextlib.suppress(EOFError):
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
        # The last ones that fit with the prompt and the line below it: what is cut off would stay behind on the screen.
        num_rows = max(_lines() - _most_prompt_rows() - 2, 0)
        live = "".join(f"{row}\n" for row in self._live[max(len(self._live) - num_rows, 0) :])
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
        # A search (Ctrl-R) has keys of its own; there Ctrl-C leaves it.
        is_typing = ~is_searching

        @keys.add("escape", "enter", filter=is_typing)
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c", filter=is_typing)
        def _(event: KeyPressEvent) -> None:
            self._interrupt()

        @keys.add("c-x", "c-e", filter=is_typing)
        def _(event: KeyPressEvent) -> None:
            # What comes meanwhile must not be written over the editor.
            self._is_away = True
            event.current_buffer.open_in_editor().add_done_callback(lambda _: self._return())

        return keys

    def _return(self) -> None:
        self._is_away = False
        self.print([])


def _lines() -> int:
    return shutil.get_terminal_size().lines


def _most_prompt_rows() -> int:
    return max(_lines() // 2, 1)
