"""One prompt from a pipe, the plain answer to stdout. No colours, no prompt, an exit code for every ending."""

import asyncio
import os
import signal
import sys

from serve.client import Client, Delta, Done
from serve.errors import EXIT_CANCELLED, EXIT_DONE, UserError
from serve.printable import printable


def read_prompt() -> str:
    """All of stdin, without the newlines at its end; raises `UserError` if there is nothing to ask."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as fault:
        raise UserError(f"stdin is not UTF-8 (byte {fault.start}); try: iconv -t utf-8") from None
    if not text.strip():
        raise UserError("nothing came on stdin; try: echo hello | make -s chat")
    return text


async def answer(client: Client, prompt: str) -> int:
    """Print the answer and a final newline; returns the exit code. Ctrl-C ends it, raising `RequestError`."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, client.cancel)
    try:
        async for piece in client.ask([{"role": "user", "content": prompt}]):
            # In a thread, so that a slow reader of ours does not make the daemon think that we are gone.
            if isinstance(piece, Delta | Done):
                await asyncio.to_thread(_write, printable(piece.text) if isinstance(piece, Delta) else "\n")
    except BrokenPipeError:
        # Nobody reads any more, as with `| head -1`; without this Python would complain once more when it leaves.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CANCELLED
    return EXIT_DONE


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
