"""How an answer leaves through a pipe: plain text, or JSON objects, one a line."""

import json
import os
import sys
from typing import Any, Protocol

from serve.chat.printable import printable
from serve.errors import (
    EXIT_CANCELLED,
    EXIT_CONTEXT,
    EXIT_ENGINE,
    EXIT_NO_DAEMON,
    EXIT_OURS,
    EXIT_USAGE,
    RequestError,
    ServeError,
)
from serve.pieces import Accepted, Delta, Done, Piece

# The `code` of an error that is none of the protocol's.
CODES = {
    EXIT_OURS: "internal",
    EXIT_USAGE: "usage",
    EXIT_NO_DAEMON: "no_daemon",
    EXIT_CONTEXT: "context",
    EXIT_CANCELLED: "cancelled",
    EXIT_ENGINE: "engine",
}


class Output(Protocol):
    """What becomes of the pieces of one answer."""

    def show(self, piece: Piece) -> str:
        """What to write for a piece, "" for nothing."""
        ...

    def close(self) -> str:
        """What to write when no more comes, also after an error."""
        ...


class PlainText:
    """The words alone, with control characters made visible. Whatever came ends with a newline."""

    def __init__(self) -> None:
        self._last = ""
        # A return at the end of a piece, which the next may make a line end.
        self._return = ""

    def show(self, piece: Piece) -> str:
        """See `Output.show`."""
        if isinstance(piece, Delta):
            text = self._return + piece.text
            self._return = "\r" if text.endswith("\r") else ""
            return self._shown(text.removesuffix("\r").replace("\r\n", "\n"))
        if isinstance(piece, Done):
            end = self._shown(self._take_return())
            return end if self._last == "\n" else end + self._shown("\n")
        return ""

    def close(self) -> str:
        """See `Output.close`."""
        end = self._shown(self._take_return())
        return end if self._last in ("", "\n") else end + self._shown("\n")

    def _take_return(self) -> str:
        taken, self._return = self._return, ""
        return taken

    def _shown(self, text: str) -> str:
        self._last = text[-1:] or self._last
        return printable(text)


class JsonLines:
    """An object a line; docs/pipes.md describes them."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def show(self, piece: Piece) -> str:
        """See `Output.show`."""
        match piece:
            case Accepted():
                return _line(
                    "accepted",
                    prompt_tokens=piece.prompt_tokens,
                    max_tokens=piece.max_tokens,
                    adapter=piece.adapter,
                    sampling=piece.sampling,
                )
            case Delta(text) if text:
                self._texts.append(text)
                return _line("delta", text=text)
            case Done():
                text = "".join(self._texts)
                return _line("done", reason=piece.reason, text=text, usage=piece.usage, timings=piece.timings)
        return ""

    def close(self) -> str:
        """See `Output.close`."""
        return ""


def error_line(error: ServeError) -> str:
    """The object that ends an answer which came to nothing."""
    code = error.code if isinstance(error, RequestError) else CODES.get(error.exit_code, CODES[EXIT_OURS])
    return _line("error", code=code, message=str(error), exit=error.exit_code)


def _line(kind: str, **fields: Any) -> str:
    # ASCII alone: no reader can stumble over an encoding, and every control character is an escape of JSON's.
    return json.dumps({"type": kind, **fields}) + "\n"


def write(text: str) -> None:
    """Write to stdout at once; always UTF-8, as stdin is read, whatever the locale."""
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def abandon_stdout() -> None:
    """Nobody can be written to any more; without this Python would complain once more when it leaves."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
