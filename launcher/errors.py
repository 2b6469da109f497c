"""What the user sees when something is wrong: one plain line a fault, ending with what to try.

Standard library only, so that bad input is refused before anything is installed or imported.
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterable

EXIT_OURS = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75


class UserError(Exception):
    """The user's mistake. Each element of `faults` is one line; each ends with what to try."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class IntegrityError(Exception):
    """What was just written is not what was trained. Never the user's fault; one line, exit code 1."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint naming the closest of `valid`, or all of them: `did you mean lora?` or `choose from: a, b`."""
    valid = list(valid)
    folded = {choice.lower(): choice for choice in reversed(valid)}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return f"did you mean {folded[close[0]]}?" if close else f"choose from: {', '.join(valid)}"


def run_main(main: Callable[[list[str]], int]) -> None:
    """Run a command and leave with its exit code; the two errors of this module become lines on stderr."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        # Every process of a training meets the same fault; the first one tells it.
        if os.environ.get("RANK", "0") == "0":
            for fault in error.faults:
                print(f"error: {fault}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except IntegrityError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_OURS)
    except KeyboardInterrupt:
        print("\nstopped: nothing was left half-written", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
