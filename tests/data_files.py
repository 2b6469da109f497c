"""Write data files of every format, as people have them, and check what is told of the bad ones."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher import data
from launcher.config import Data
from launcher.errors import UserError


def jsonl(records: list[Any]) -> bytes:
    """One record a line."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def table(records: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    """Rows under a header; what is not text is written as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
    names = list(dict.fromkeys(name for record in records for name in record))
    writer.writerow(names)
    for record in records:
        cells = [record.get(name, "") for name in names]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return text.getvalue().encode()


def parquet(records: list[dict[str, Any]]) -> bytes:
    """A parquet file in small row groups."""
    import pyarrow
    from pyarrow import parquet as pq

    sink = io.BytesIO()
    pq.write_table(pyarrow.Table.from_pylist(records), sink, row_group_size=2)
    return sink.getvalue()


WRITERS = {
    "jsonl": jsonl,
    "ndjson": jsonl,
    "json": lambda records: json.dumps(records, indent=1).encode(),
    "csv": table,
    "tsv": lambda records: table(records, "\t"),
    "parquet": parquet,
}


def write(folder: Path, suffix: str, records: list[Any]) -> str:
    """The path of a new file of this format."""
    file = folder / f"orders.{suffix}"
    file.write_bytes(WRITERS[suffix](records))
    return str(file)


def write_orders(folder: Path) -> Path:
    """A file of 80 orders of one to four things, so of many lengths; 8 of them will be held out."""
    things = ("cappuccino", "tea", "muffin with jam", "orange juice", "toast", "croissant", "hot chocolate with milk")
    records = []
    for i in range(80):
        chosen = {things[(i * 5 + j * 3) % len(things)]: 1 + (i // 7 + j) % 9 for j in range(1 + i % 4)}
        asked = " and ".join(f"{number} {thing}" for thing, number in chosen.items())
        told = json.dumps({thing.split()[0]: number for thing, number in chosen.items()})
        records.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
    file = folder / "orders.jsonl"
    file.write_bytes(jsonl(records))
    return file


def faults_of(source, **options):
    """The lines of the error that reading `source` ends with."""
    with pytest.raises(UserError) as error:
        data.read(Data(source=str(source), **options))
    return error.value.faults


def assert_clear(faults):
    """Each is one line of a bearable length, with something to try."""
    for fault in faults:
        assert "\n" not in fault
        assert len(fault) < 500
        assert re.search(r"; \S", fault), f"says nothing to try: {fault}"
        assert "Traceback" not in fault


def assert_told(faults, source, expected):
    """`expected` lists "line: words": the places and, in each, words of the fault."""
    assert_clear(faults)
    assert len(faults) == len(expected), faults
    for fault, told in zip(faults, expected, strict=True):
        place, _, words = told.partition(": ")
        assert re.match(re.escape(f"{source}:{place}") + r"( \(record \d+\))?: ", fault), (fault, told)
        assert words in fault
