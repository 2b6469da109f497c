"""One question from a pipe, its answer to stdout. No colours, no prompt, an exit code for every ending."""

import asyncio
import contextlib
import signal
import sys
from typing import Any

from serve.arguments import Arguments
from serve.chat.outputs import JsonLines, Output, PlainText, abandon_stdout, error_line, write
from serve.chat.phrases import say
from serve.chat.sampling import options_of
from serve.client import Client
from serve.errors import EXIT_CANCELLED, EXIT_DONE, ServeError, UserError
from serve.protocol import MAX_MESSAGE_BYTES


def is_piped() -> bool:
    """Whether one end at least is no terminal."""
    return not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def read_question(attached: list[str]) -> str:
    """All of stdin behind the files, without the newlines at its end; raises `UserError` if there is nothing to ask.

    With files, nobody needs to type: neither a terminal nor an empty stdin is waited for.
    """
    if sys.stdout is None:
        raise UserError(say("stdout_closed"))
    data = b""
    if sys.stdin is not None and not (attached and sys.stdin.isatty()):
        data = sys.stdin.buffer.read(MAX_MESSAGE_BYTES + 1)
    if len(data) > MAX_MESSAGE_BYTES:
        raise UserError(say("stdin_too_large", most=MAX_MESSAGE_BYTES // 2**20))
    try:
        text = data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as fault:
        raise UserError(say("stdin_not_utf8", byte=fault.start)) from None
    if not text.strip() and not attached:
        raise UserError(say("stdin_empty"))
    return "\n\n".join([*attached, *([text] if text.strip() else [])])


async def answer(client: Client, question: str, arguments: Arguments) -> int:
    """Write the answer; returns the exit code. Ctrl-C ends it, raising `RequestError`; a second one ends the program."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        client.cancel()
        # Where nobody reads, what is being written would hold up the news that the answer is cancelled.
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    messages: list[dict[str, Any]] = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages.append({"role": "user", "content": question})
    try:
        await _stream(
            client, messages, options_of(arguments.sampling), JsonLines() if arguments.is_json else PlainText()
        )
    except BrokenPipeError:
        # As with `| head -1`.
        abandon_stdout()
        return EXIT_CANCELLED
    except OSError as fault:
        abandon_stdout()
        raise ServeError(say("answer_unwritten", fault=fault.strerror)) from None
    return EXIT_DONE


async def _stream(client: Client, messages: list[dict[str, Any]], options: dict[str, Any], output: Output) -> None:
    # In a thread, so that a slow reader of ours does not make the daemon think that we are gone.
    try:
        async with contextlib.aclosing(client.ask(messages, **options)) as pieces:
            async for piece in pieces:
                await asyncio.to_thread(write, output.show(piece))
    finally:
        await asyncio.to_thread(write, output.close())


def tell_in_json(error: ServeError) -> None:
    """The last object, for whoever still reads."""
    if sys.stdout is None:
        return
    try:
        write(error_line(error))
    except OSError:
        abandon_stdout()
