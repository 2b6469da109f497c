"""A data source -> a stream of records: files of five formats, a folder of texts, a dataset of the hub.

A record that cannot be read is a `Fault` in the same stream, so that all faults of a file are known at once.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import hubdata, shapes
from launcher.config import Data
from launcher.jsonwalk import Walk, told
from launcher.textfile import MAX_LINE, UnreadableError, check_head, lines, whole
from launcher.variables import check_data, is_hub_data, text_files

# The two that are said in the csv reader's own terms.
CSV_TOLD = {
    "unexpected end of data": "a quote that is never closed",
    "field larger than field limit": "a field of more than 16 MiB; is a quote never closed?",
}


@dataclass(frozen=True)
class Record:
    """One thing to learn from, as it was written, and where."""

    where: str
    value: Any


@dataclass(frozen=True)
class Fault:
    """What is wrong and what to try. A `fatal` one hides what follows it, so it cannot be left out."""

    where: str
    what: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


Stream = Iterator[Record | Fault]


def records(data: Data) -> Stream:
    """Every record of `data.source` and every fault; raises `UserError` when a hub dataset cannot be had."""
    path = Path(data.source)
    if is_hub_data(data.source):
        for number, row in enumerate(hubdata.rows(data), start=1):
            yield Record(f"{data.source}:row {number}", row)
    elif fault := check_data(data.source):
        yield Fault(data.source, fault, fatal=True)
    elif path.is_dir():
        for file in sorted(text_files(path)):
            yield from _safely(_text, file, fatal=False)
    else:
        yield from _safely(_file, path, fatal=True)


def _safely(read: Callable[[Path], Stream], path: Path, *, fatal: bool) -> Stream:
    """What `read` yields; what stops it becomes the last fault."""
    try:
        yield from read(path)
    except UnreadableError as error:
        yield Fault(f"{path}:{error.line}", str(error), fatal)
    except OSError as error:
        yield Fault(str(path), f"cannot be read ({error.strerror or error}); try another file", fatal)


def _text(path: Path) -> Stream:
    check_head(path)
    # One kind of line end, whichever system the file comes from.
    yield Record(str(path), {"text": whole(path).replace("\r\n", "\n")})


def _file(path: Path) -> Stream:
    suffix = path.suffix.lower()
    if suffix != ".parquet":
        check_head(path)
    yield from READERS[suffix](path)


def _json_lines(path: Path) -> Stream:
    for number, line in lines(path):
        where = f"{path}:{number}"
        if isinstance(line, UnreadableError):
            yield Fault(where, str(line))
        elif line.strip():
            yield _parse(where, line)


def _parse(where: str, line: str) -> Record | Fault:
    try:
        return Record(where, json.loads(line))
    except json.JSONDecodeError as error:
        what = f"not JSON ({told(error)}, column {error.colno})"
    except RecursionError:
        what = "nested too deeply"
    except ValueError:
        what = "a number of too many digits"
    return Fault(where, f"{what}; write one object a line")


def _json(path: Path) -> Stream:
    """A list of records, or an object with one list in it; each record is known by the line it begins on."""
    if _holds_json_lines(path):
        yield from _json_lines(path)
        return
    walk = Walk(whole(path), MAX_LINE)
    if not walk.peek():
        return
    elements = _members(walk) if walk.peek() == "{" else walk.items()
    # With its number too: programs write the whole list on one line.
    for number, (line, value) in enumerate(elements, start=1):
        yield Record(f"{path}:{line} (record {number})", value)
    if walk.peek():
        raise UnreadableError(walk.line, "more text after the end of the JSON; write one list, or one object a line")


def _holds_json_lines(path: Path) -> bool:
    """Whether a .json file has one object a line, as many do: its first line is a whole one, and not the only one."""
    filled = (line for _, line in lines(path) if isinstance(line, UnreadableError) or line.strip())
    first, second = next(filled, None), next(filled, None)
    return isinstance(first, str) and second is not None and isinstance(_parse("", first), Record)


def _members(walk: Walk) -> Iterator[tuple[int, Any]]:
    """The elements of the one list in the object that comes next."""
    found: list[str] = []
    for key in walk.names():
        if walk.peek() != "[":
            walk.value()
            continue
        found.append(key)
        if key in shapes.KEYS:
            raise UnreadableError(walk.line, "one record and not a list of them; write [{…}, {…}]")
        if len(found) > 1:
            raise UnreadableError(walk.line, f"a second list, {key!r} beside {found[0]!r}; keep one of them")
        yield from walk.items()
    if not found:
        raise UnreadableError(walk.line, "an object without a list of records in it; write [{…}, {…}]")


def _table(path: Path) -> Stream:
    """Rows under a header. A row is known by the line it begins on, however many it fills."""
    csv.field_size_limit(MAX_LINE)
    readable = _readable_lines(path)
    first = next(readable, "")
    # Where the comma is the decimal point, spreadsheets separate by semicolons.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;", key=first.count)
    rows = csv.reader(itertools.chain([first], readable), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in rows:
            where = f"{path}:{line}"
            line = rows.line_num + 1
            if not header:
                header = [name.strip() for name in row]
                _check_columns(header)
            elif len(row) == len(header):
                yield Record(where, dict(zip(header, row, strict=True)))
            elif row:
                yield Fault(
                    where, f"{len(row)} field(s), the header has {len(header)}; quote what holds a {delimiter!r}"
                )
    except csv.Error as error:
        what = CSV_TOLD.get(str(error).split(" (")[0], error)
        raise UnreadableError(line, f"not CSV ({what}); quote the field and double the quotes in it") from None


def _readable_lines(path: Path) -> Iterator[str]:
    """Lines for the csv reader. A bad one ends them: it may hold the quote that ends a field."""
    for _, line in lines(path):
        if isinstance(line, UnreadableError):
            raise line
        yield line


def _check_columns(names: list[str]) -> None:
    if fault := shapes.unknown_keys(names):
        raise UnreadableError(1, fault)
    if twice := [name for name in names if name in shapes.KEYS and names.count(name) > 1]:
        raise UnreadableError(1, f"two columns named {twice[0]!r}; rename one of them")


def _parquet(path: Path) -> Stream:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with path.open("rb") as file, parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            _check_columns(names)
            for batch in table.iter_batches(256, columns=[name for name in names if name in shapes.KEYS]):
                for row in range(len(batch)):
                    number += 1
                    yield _row(f"{path}:row {number}", batch, row)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        what = str(error).splitlines()[0].rstrip(".")
        yield Fault(f"{path}:row {number + 1}", f"not a whole parquet file ({what}); fetch it again", fatal=True)


def _row(where: str, batch: Any, row: int) -> Record | Fault:
    try:
        return Record(where, batch.slice(row, 1).to_pylist()[0])
    except UnicodeDecodeError:
        return Fault(where, "not UTF-8 text; write the table again from UTF-8")


READERS: dict[str, Callable[[Path], Stream]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
