"""The terminal: a prompt that is always there, answers above it, and a Ctrl-C that means one thing."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable

from serve.arguments import Arguments
from serve.chat import actions, commands
from serve.chat.completion import Words
from serve.chat.conversation_events import Params, System
from serve.chat.conversation_file import ConversationFile
from serve.chat.conversation_read import listing
from serve.chat.history import History
from serve.chat.keeping import short
from serve.chat.live_screen import LiveScreen
from serve.chat.phrases import say
from serve.chat.plain_screen import PlainScreen
from serve.chat.printable import printable
from serve.chat.screen import Screen, prose
from serve.chat.talk import Talk, describe
from serve.client import Client, ShowProgress
from serve.errors import EXIT_CANCELLED, EXIT_DONE
from serve.progress import is_live
from serve.runtime import state_directory

# An answer that is under way when the user leaves is kept as far as it came.
LEAVE_SECONDS = 1.0


class Terminal:
    """One terminal, one conversation at a time."""

    def __init__(
        self,
        client: Client,
        reconnect: Callable[[ShowProgress], Awaitable[Client]],
        arguments: Arguments,
        attached: list[str],
    ) -> None:
        folder = state_directory()
        self._conversations = folder / "conversations"
        self._talk = Talk(client, reconnect, ConversationFile(self._conversations), may_start=arguments.start)
        self._talk.attached = attached
        self._is_hinted = False
        self._code = EXIT_DONE
        self._screen: Screen
        if is_live(sys.stdout):
            completer = Words(lambda: self._talk.adapters, self._names)
            history = History(folder)
            self._screen = LiveScreen(history, completer, self._toolbar, self._at_once, self._interrupt)
        else:
            self._screen = PlainScreen(self._at_once, self._interrupt)
        self._talk.screen = self._screen
        self._prepare(arguments)

    def _prepare(self, arguments: Arguments) -> None:
        """What was asked for on the command line."""
        self._talk.require_adapter(self._talk.adapter)
        self._talk.begin()
        if arguments.system:
            self._talk.happen(System(arguments.system))
        if arguments.sampling:
            self._talk.happen(Params(arguments.sampling))

    async def run(self) -> int:
        """Talk until Ctrl-D or /quit; returns the exit code."""
        # As with Ctrl-D, and the terminal is left as it was found.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._end)
        self._screen.print(prose(f"{describe(self._talk.client, self._talk.adapter)}. {say('help_hint')}"))
        if not self._talk.conversation.system and (own := self._talk.own_system):
            self._talk.tell("system_own", text=short(own))
        lines = asyncio.create_task(self._obey())
        running = asyncio.create_task(self._screen.run())
        try:
            await asyncio.wait([lines, running], return_when=asyncio.FIRST_COMPLETED)
        finally:
            # What waits was typed for after an answer that now ends early.
            num_left = self._screen.forget()
            if self._talk.interrupt():
                await asyncio.wait([lines], timeout=LEAVE_SECONDS)
            self._screen.leave()
            await running
            if num_left:
                self._talk.tell("undone_lines", number=num_left)
            if not lines.done():
                lines.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await lines
            if fault := self._talk.file.close():
                print(f"error: {fault}", file=sys.stderr)
            self._talk.client.__exit__()
        return self._code

    def _end(self) -> None:
        self._code = EXIT_CANCELLED
        self._screen.leave()

    async def _obey(self) -> None:
        """Take the lines one after another."""
        await self._talk.recount()
        while True:
            line = commands.parse(await self._screen.line())
            self._is_hinted = False
            if line.prompt.strip():
                await self._talk.do(actions.ask(self._talk, line.prompt))
            elif line.problem:
                self._screen.print(prose(line.problem))
            elif line.command:
                await self._talk.do(actions.ACTIONS[line.command](self._talk, line.rest))

    def _at_once(self, text: str) -> bool:
        """Whether a line was one that need not wait for the answer that is under way."""
        line = commands.parse(text)
        if line.command == "/quit":
            self._screen.leave()
        elif line.command == "/help":
            keys = commands.KEYS if self._screen.has_colour else commands.PLAIN_KEYS
            self._screen.print(commands.help_text(keys))
        return line.command in commands.AT_ONCE

    def _interrupt(self) -> None:
        # Once is enough for who holds the key down.
        if not self._talk.interrupt() and not self._is_hinted:
            self._is_hinted = True
            self._talk.tell("leave_hint")

    def _names(self) -> list[str]:
        return [entry.name for entry in listing(self._conversations)]

    def _toolbar(self) -> str:
        """Who answers, how full the context is, how fast it goes, and what is going on."""
        talk = self._talk
        parts = [
            f"{talk.client.info['model']}@{talk.adapter}",
            say("tokens", used=talk.used if talk.used <= talk.context else f">{talk.context}", context=talk.context),
            say("rate", rate=f"{talk.rate:.1f}") if talk.rate else "",
            talk.state or (say("lost") if talk.client.is_lost else ""),
            say("lines_wait", number=self._screen.num_waiting) if self._screen.num_waiting else "",
            say("files_wait", number=len(talk.attached)) if talk.attached else "",
        ]
        return " " + printable("  ·  ".join(part for part in parts if part))
