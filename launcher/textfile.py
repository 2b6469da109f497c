"""Files that ought to be UTF-8 text: read without trusting them, every fault with its line."""

import codecs
import itertools
from collections.abc import Iterator
from pathlib import Path

MIB = 2**20
MAX_LINE = 16 * MIB
MAX_FILE = 256 * MIB
HEAD = 1024
# What files that are something else begin with, and what can be done about it.
MAGIC = {
    b"\xff\xfe": "UTF-16 text, not UTF-8; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text, not UTF-8; save it as UTF-8",
    b"\x1f\x8b": "compressed with gzip; unpack it with gunzip",
    b"BZh": "compressed with bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "compressed with xz; unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it with unzstd",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or export it as .csv",
    b"PAR1": "a parquet file; name it .parquet",
    b"%PDF": "a PDF file; save its text as .txt in a folder of texts",
}


class UnreadableError(Exception):
    """What is wrong with a file at `line`, ending with what to try."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def check_head(path: Path) -> None:
    """Raise `UnreadableError` if the file begins as no text does."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise UnreadableError(1, what)
    if b"\0" in head:
        raise UnreadableError(
            _line_of(head, head.index(b"\0")), "a NUL byte, so it is not UTF-8 text; save it as UTF-8"
        )


def lines(path: Path) -> Iterator[tuple[int, str | UnreadableError]]:
    """Each line with its number, or why it cannot be read; none longer than `MAX_LINE` is ever held."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                yield (
                    number,
                    UnreadableError(number, f"a line of more than {MAX_LINE // MIB} MiB; write one object a line"),
                )
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                continue
            try:
                yield number, _decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number)
            except UnreadableError as error:
                yield number, error


def whole(path: Path) -> str:
    """The text of a file that must be held at once; raises `UnreadableError`."""
    if path.stat().st_size > MAX_FILE:
        raise UnreadableError(1, f"larger than {MAX_FILE // MIB} MiB; write one object a line, in a .jsonl file")
    return _decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), 1)


def _decode(data: bytes, first_line: int) -> str:
    if (nul := data.find(b"\0")) >= 0:
        raise UnreadableError(first_line + _line_of(data, nul) - 1, "a NUL byte, so it is not UTF-8 text; remove it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + _line_of(data, error.start) - 1
        raise UnreadableError(line, f"not UTF-8 text (byte 0x{data[error.start]:02x}); save it as UTF-8") from None


def _line_of(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1
