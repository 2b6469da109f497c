"""The terminal: a prompt with history, streamed answers, and a Ctrl-C that means one thing."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from serve import commands
from serve.client import Client, Delta, Done
from serve.engine import BASE
from serve.errors import EXIT_DONE, RequestError, ServeError
from serve.keyboard import own_keyboard
from serve.printable import printable
from serve.progress import is_live
from serve.protocol import Code
from serve.runtime import state_directory
from serve.sessions import Conversation

MAX_HISTORY_BYTES = 2**20


class Terminal:
    """One conversation with one daemon; `reconnect` finds the daemon again after it was restarted."""

    def __init__(self, client: Client, reconnect: Callable[[], Awaitable[Client]]) -> None:
        self._client = client
        self._reconnect = reconnect
        self._conversation = Conversation()
        self._has_colour = is_live(sys.stdout) and "NO_COLOR" not in os.environ
        self._prompt: PromptSession[str] = PromptSession(
            history=FileHistory(history_file()), key_bindings=_keys(), enable_open_in_editor=True
        )

    async def run(self) -> int:
        """Talk until Ctrl-D or /quit; returns the exit code."""
        print(banner(self._client))
        with own_keyboard(lambda: self._client.cancel()):
            while (text := await self._read()) is not None:
                line = commands.parse(text)
                if line.command == "/quit":
                    break
                if line.prompt.strip():
                    await self._guarded(self._exchange(line.prompt))
                elif line.problem:
                    print(line.problem)
                elif line.command:
                    await self._guarded(self._obey(line.command))
        self._client.__exit__()
        return EXIT_DONE

    async def _read(self) -> str | None:
        """The next line, None when the user leaves."""
        while True:
            try:
                text = await self._prompt.prompt_async([("bold", "> ")], handle_sigint=False)
            except KeyboardInterrupt:
                if not self._prompt.default_buffer.text:
                    print("Ctrl-D or /quit leaves.")
            except EOFError:
                return None
            else:
                # A pasted byte that is no UTF-8 arrives as a lone surrogate, which no message can carry.
                return text.encode("utf-8", "replace").decode()

    async def _guarded(self, action: Awaitable[None]) -> None:
        try:
            await action
        except ServeError as fault:
            print(f"error: {fault}", file=sys.stderr)

    async def _obey(self, command: str) -> None:
        if command == "/help":
            print(commands.help_text())
        elif command == "/reset":
            self._conversation.reset()
            print("The conversation is forgotten.")
        elif command == "/status":
            status = await (await self._connected()).status()
            busy = f"{status['busy_slots']} of {status['num_slots']} slots busy, {status['waiting']} waiting"
            print(f"{describe(self._client)}; {busy}, {len(self._conversation.turns)} turns in this conversation")

    async def _exchange(self, prompt: str) -> None:
        """Ask and print; whatever happens, the turns of the conversation alternate afterwards."""
        client = await self._connected()
        self._conversation.add_user(prompt)
        heard: list[str] = []
        done: Done | None = None
        try:
            async for piece in client.ask(self._conversation.messages()):
                if isinstance(piece, Delta):
                    heard.append(piece.text)
                    # In a thread: Ctrl-S stops the screen, and the pings must go on.
                    await asyncio.to_thread(_write, printable(piece.text))
                elif isinstance(piece, Done):
                    done = piece
        except RequestError as fault:
            if fault.code != Code.CANCELLED:
                raise
            _write(" [interrupted]" if heard else "[interrupted]\n")
        finally:
            self._conversation.add_answer("".join(heard), is_interrupted=done is None)
            if heard:
                print()
        if done:
            self._report(done)

    def _report(self, done: Done) -> None:
        used = done.usage["prompt_tokens"] + done.usage["completion_tokens"]
        figures = [
            f"{done.usage['completion_tokens']} tokens",
            f"{done.tokens_per_second:.1f} tokens/s",
            f"context {used}/{self._client.info['context']}",
        ]
        text = ", ".join(figures) + ("; the context is full, try /reset" if done.reason == "length" else "")
        print(f"\x1b[2m{text}\x1b[0m" if self._has_colour else text)

    async def _connected(self) -> Client:
        if self._client.is_lost:
            client = await self._reconnect()
            self._client.__exit__()
            self._client = client
        return self._client


def banner(client: Client) -> str:
    """The first line: who speaks, and how to leave."""
    return f"{describe(client)}. /help shows the commands, Ctrl-D leaves."


def describe(client: Client) -> str:
    """`runs/x: smollm2-135m + x (adapters, bf16), context 4096 tokens; also here: y, base`."""
    info = client.info
    names = list(dict.fromkeys(adapter["name"] for adapter in info["adapters"]))
    answers = (client.adapter or names[0]).partition("@")[0]
    others = [name for name in names if name != answers]
    model = info["model"] if answers == BASE else f"{info['model']} + {answers}"
    here = f"; also here: {', '.join(others)}" if others else ""
    return f"{client.record.run}: {model} ({info['hold']}, {info['dtype']}), context {info['context']} tokens{here}"


def history_file() -> Path:
    """The 0600 file of earlier prompts; of a long one only the newer half is kept, so that the start stays quick."""
    path = state_directory() / "history"
    path.touch(mode=0o600)
    if path.stat().st_size > MAX_HISTORY_BYTES:
        kept = path.read_bytes()[-MAX_HISTORY_BYTES // 2 :]
        # An entry begins with an empty line and its time.
        path.write_bytes(kept[kept.find(b"\n# ") :])
    return path


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
