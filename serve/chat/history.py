"""Earlier questions, in a file that stays small."""

from pathlib import Path

MAX_BYTES = 2**20


def history_file(folder: Path) -> Path:
    """The 0600 file; of a long one only the newer half is kept, so that the start stays quick."""
    path = folder / "history"
    path.touch(mode=0o600)
    if path.stat().st_size > MAX_BYTES:
        kept = path.read_bytes()[-MAX_BYTES // 2 :]
        # An entry begins with an empty line and its time.
        path.write_bytes(kept[kept.find(b"\n# ") :])
    return path
