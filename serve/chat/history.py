"""Earlier questions, in a file that stays small. Where it cannot be read or written they are those of this time only."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import FileHistory

MAX_BYTES = 2**20


class History(FileHistory):
    """`<folder>/history`, 0600; of a long one only the newer half is kept, so that the start stays quick."""

    def __init__(self, folder: Path) -> None:
        path = folder / "history"
        super().__init__(str(path))
        with contextlib.suppress(OSError):
            path.touch(mode=0o600)
            if path.stat().st_size > MAX_BYTES:
                kept = path.read_bytes()[-MAX_BYTES // 2 :]
                # An entry begins with an empty line and its time.
                path.write_bytes(kept[kept.find(b"\n# ") :])

    def load_history_strings(self) -> Iterable[str]:
        """What the file holds, the newest first."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """Write one more."""
        with contextlib.suppress(OSError):
            super().store_string(string)
