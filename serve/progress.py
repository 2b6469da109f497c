"""How far loading is: a live bar on a terminal, one line a stage anywhere else."""

import os
import sys
from typing import TextIO

from serve.chat.printable import printable

WIDTH = 24


def is_live(stream: TextIO) -> bool:
    """Whether this stream may get escapes, be it for colour or to move the cursor; decided here for all of `serve`.

    Not where stdout is read by a program: stderr may go the same way. NO_COLOR counts when it is not empty.
    """
    is_terminal = all(one is not None and one.isatty() for one in (stream, sys.stdout))
    return is_terminal and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")


class Progress:
    """Shows the stages of one loading."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_live = is_live(stream)
        self._stage = ""

    def show(self, stage: str, done: int, total: int) -> None:
        """Stage `stage` is at `done` of `total`; total 0 means that nobody knows."""
        # A daemon elsewhere may call it anything.
        stage = printable(stage)
        if self._is_live:
            filled = WIDTH * min(done, total) // total if total else 0
            bar = f" [{'#' * filled}{'-' * (WIDTH - filled)}] {100 * done // total:3d}%" if total else " ..."
            self._write(f"\r\x1b[Kloading: {stage}{bar}")
        elif stage != self._stage:
            self._write(f"loading: {stage}\n")
        self._stage = stage

    def clear(self) -> None:
        """Loading is over: take the bar away."""
        if self._is_live and self._stage:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
