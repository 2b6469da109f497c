"""What can go wrong for the user of a daemon, each kind with its own exit code. Standard library only."""

import difflib
import sys
from collections.abc import Iterable
from typing import Any

from serve.chat.printable import printable

EXIT_DONE = 0
EXIT_OURS = 1
EXIT_USAGE = 2
EXIT_NO_DAEMON = 3
EXIT_CONTEXT = 4
EXIT_CANCELLED = 5
EXIT_ENGINE = 6

# How the client leaves after an ERROR message; a full queue and a leaving daemon both mean "none to serve you now".
EXIT_BY_CODE = {
    "E_BAD_REQUEST": EXIT_USAGE,
    "E_UNSUPPORTED": EXIT_USAGE,
    "E_AUTH": EXIT_USAGE,
    "E_NO_ADAPTER": EXIT_USAGE,
    "E_ADAPTER_INCOMPATIBLE": EXIT_USAGE,
    "E_CONTEXT": EXIT_CONTEXT,
    "E_QUEUE_FULL": EXIT_NO_DAEMON,
    "E_LOADING": EXIT_NO_DAEMON,
    "E_CANCELLED": EXIT_CANCELLED,
    "E_DEADLINE": EXIT_CANCELLED,
    "E_DRAINING": EXIT_NO_DAEMON,
    "E_ENGINE": EXIT_ENGINE,
    "E_OOM": EXIT_ENGINE,
    "E_INTERNAL": EXIT_OURS,
}


class ServeError(Exception):
    """One line that ends with what to try; `exit_code` is how the program leaves."""

    exit_code = EXIT_OURS


class UserError(ServeError):
    """The user's mistake."""

    exit_code = EXIT_USAGE


class NoDaemonError(ServeError):
    """No daemon answers, or it went away in the middle of an answer."""

    exit_code = EXIT_NO_DAEMON


class EngineError(ServeError):
    """The engine process could not load the run, or died."""

    exit_code = EXIT_ENGINE


class RequestError(ServeError):
    """A request ended with an ERROR message of this `code`; `detail` holds its counts."""

    def __init__(self, code: str, message: str, detail: dict[str, Any]) -> None:
        super().__init__(message)
        self.code = code
        self.detail = detail
        self.exit_code = EXIT_BY_CODE.get(code, EXIT_OURS)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint naming the closest of `valid`, or all of them: `did you mean RUN?` or `choose from: RUN, HOLD`."""
    choices = list(valid)
    close = closest(name, choices)
    return f"did you mean {close}?" if close else f"choose from: {', '.join(choices)}"


def closest(name: str, valid: Iterable[str]) -> str:
    """The one of `valid` that was probably meant, "" if none is like it."""
    folded = {choice.lower(): choice for choice in valid}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return folded[close[0]] if close else ""


def report(error: ServeError) -> None:
    """Say on stderr what went wrong: one line whatever it quotes, and nothing that a terminal would obey."""
    line = printable(str(error)).replace("\n", "\\n")
    # Closed from the start, it is None; and in one piece, because others may write to the same terminal.
    if sys.stderr is not None:
        sys.stderr.write(f"error: {line}\n")
