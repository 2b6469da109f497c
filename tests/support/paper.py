"""A screen that is read afterwards: the real client, its real commands and its real daemon without a terminal between them."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence

import pytest

from serve import __main__ as command
from serve.chat import commands, piped, terminal
from serve.chat.screen import Lines
from tests.serve_fixtures import PATIENCE, Box


class Paper(Lines):
    """What is said stands in `rows`, what was put at the prompt in `offered`; `choices` are answered before who asks can wait."""

    has_colour = True

    def __init__(self, on_line: Callable[[str], bool] = lambda _: False) -> None:
        super().__init__(on_line)
        self.rows: list[str] = []
        self.offered = ""
        self.choices: list[str] = []
        self._is_awaited = asyncio.Event()

    def print(self, rows: Iterable[str]) -> None:
        self.rows += rows

    def show(self, live: Sequence[str]) -> None:
        pass

    def prefill(self, text: str) -> None:
        self.offered = text

    async def line(self) -> str:
        if not self.num_waiting:
            self._is_awaited.set()
        return await super().line()

    async def choice(self) -> str:
        if self.choices:
            return self.choices.pop(0)
        self._is_awaited.set()
        return await super().choice()

    async def enter(self, text: str) -> list[str]:
        """Type a line; the rows that answer it without their colours, until the next line is awaited."""
        async with asyncio.timeout(PATIENCE):
            await self._is_awaited.wait()
            before = len(self.rows)
            if commands.parse(text).command not in commands.AT_ONCE:
                self._is_awaited.clear()
            self.put(text)
            await self._is_awaited.wait()
        return [re.sub(r"\x1b\[[\d;]*m", "", row) for row in self.rows[before:]]


def chat_on_paper(
    box: Box, patch: pytest.MonkeyPatch, script: Callable[[Paper], Awaitable[None]], columns: int = 300
) -> None:
    """`python -m serve chat` with the daemon of this box, in this process; `script` is who types, and leaves at its end."""

    faults: list[BaseException] = []

    class Played(Paper):
        def __init__(self, on_line: Callable[[str], bool], _: object) -> None:
            super().__init__(on_line)

        async def run(self) -> None:
            # What went wrong waits until the client has left.
            try:
                await script(self)
            except Exception as fault:
                faults.append(fault)

        def leave(self) -> None:
            pass

    patch.chdir(box.work)
    for name, value in {**box.environment(), "COLUMNS": str(columns)}.items():
        patch.setenv(name, value)
    patch.setattr(piped, "is_piped", lambda: False)
    patch.setattr(terminal, "PlainScreen", Played)
    code = command.main(["chat"])
    for fault in faults:
        raise fault
    assert code == 0
