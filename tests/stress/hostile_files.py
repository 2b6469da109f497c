"""Read data files that somebody has damaged, and lines that do not end: each ends well or with clear faults, and within bounded memory.

    python -m tests.stress.hostile_files [SEED=0] [FILES=20000] [MB=200]

The damaged files are good ones of every format, with bits turned, ends cut off, junk put in, pieces doubled, drawn from the seed;
each is read twice, the second time with faulty records left out. The long ones hold a line, a value or a field of so many MB, and
each is read by a process of its own. Fails unless everything that cannot be read ends with faults of one line that say what to
try, and no long one takes more memory than it may.
"""

import gzip
import json
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import data
from launcher.config import Data
from launcher.errors import UserError
from launcher.variables import ROOT
from tests.data_files import WRITERS, assert_clear
from tests.stress.program import begin, finish, run_program

MIB = 2**20
JUNK = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xf0\x9f\xa6", b"\xc3\xa9", b'"', b"\\ud83d", b"\r", b"\n", b"\r\n", b"[" * 5000, b'{"a":' * 5000,
    b"7" * 5000, b"}]", b"NaN", b"null", b",", b";", b"\t", b"PAR1", b"\x1f\x8b", b"BZh9",
)  # fmt: skip
TEXTS = ("hola", "a café", "ñ 🦊", "", " ", "two\nlines", 'a "quote"', "a, b; c\td", "<|im_end|>", "\x1b[2J")
# Prints how far the memory of the process has grown, in MB, from where the libraries are there, and the faults.
READ = """
import re, sys
from pathlib import Path
from launcher import data
from launcher.config import Data
from launcher.errors import UserError
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
try:
    data.read(Data(source=sys.argv[1]))
except UserError as error:
    print(status("VmHWM") - before, *error.faults, sep="\\n")
"""


@dataclass(frozen=True)
class Long:
    """A file with something long in it: how it begins, what it is filled with, how it ends; what must be said of it.

    Reading it may take `most_mb`, and `most_share` of its own size.
    """

    name: str
    start: bytes
    filling: bytes
    end: bytes
    says: tuple[str, ...]
    most_mb: int = 120
    most_share: float = 0.0


# What must be held whole is read whole; a value may be twice as long as the limit before it is seen to be too long.
LONG = (
    Long("line.jsonl", b'{"text": "', b"a", b'"}\n{"text": 7}\n', (":1: a line of more than 16 MiB", ":2: ")),
    Long("list.json", '[{"text": "☕'.encode(), b"a", b'"}]', (":1: a value of more than 16 MiB",), 250, 3.0),
    Long("objects.json", b"[[", b"{}," * 8, b"{}]]", (":1: a value of more than 16 MiB",), 1000, 1.5),
    Long("field.csv", b'text\n"', b"a" * 63 + b"\n", b'"\n', (":2: not CSV (a field of more than 16 MiB",)),
    Long("row.csv", b"text\n", b"a", b"\n", (":2: a line of more than 16 MiB",)),
)


def good_file(draw: random.Random) -> tuple[str, bytes]:
    """(suffix, content) of a file that can be read."""
    shapes: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"text": draw.choice(TEXTS) + "x"},
        lambda: {"prompt": draw.choice(TEXTS) + "x", "completion": draw.choice(TEXTS) + "y"},
        lambda: {"instruction": "a" + draw.choice(TEXTS), "input": draw.choice(TEXTS), "output": "b"},
        lambda: {
            "messages": [
                {"role": role, "content": draw.choice(TEXTS) + "x"}
                for role in ("user", "assistant") * draw.randint(1, 3)
            ]
        },
    )
    shape, suffix = draw.choice(shapes), draw.choice(list(WRITERS))
    return suffix, WRITERS[suffix]([shape() for _ in range(draw.randint(2, 30))])


def turn_a_bit(content: bytes, draw: random.Random) -> bytes:
    """One bit turned."""
    spoilt = bytearray(content or b"\0")
    spoilt[draw.randrange(len(spoilt))] ^= 1 << draw.randrange(8)
    return bytes(spoilt)


def damage(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """(kind, content) after one damage."""
    at, size = draw.randrange(len(content) + 1), draw.randint(1, 40)
    kinds: dict[str, Callable[[], bytes]] = {
        "a bit turned": lambda: turn_a_bit(content, draw),
        "cut off": lambda: content[:at],
        "junk": lambda: content[:at] + draw.choice(JUNK) + content[at:],
        "doubled": lambda: content[:at] + content[max(at - size, 0) :],
        "left out": lambda: content[:at] + content[at + size :],
        "compressed": lambda: gzip.compress(content, mtime=0),
    }
    kind = draw.choice(list(kinds))
    return kind, kinds[kind]()


def read_one(path: Path, on_error: str) -> str:
    """`read`, or `refused` with clear faults; raises whatever else comes of it."""
    try:
        data.read(Data(source=str(path), on_error=on_error))
    except UserError as error:
        assert_clear(error.faults)
        return "refused"
    return "read"


def damaged(files: int, draw: random.Random, folder: Path) -> tuple[list[str], Counter[str]]:
    """Damage so many files and read each: the faults, and how often each ending came."""
    faults, ends = list[str](), Counter[str]()
    for number in range(files):
        suffix, content = good_file(draw)
        kinds = []
        for _ in range(draw.randint(1, 3)):
            kind, content = damage(content, draw)
            kinds.append(kind)
        path = folder / f"file-{number}.{suffix}"
        path.write_bytes(content)
        for on_error in ("stop", "skip"):
            try:
                ends[read_one(path, on_error)] += 1
            except Exception:
                faults.append(f"{path.name} ({', '.join(kinds)}; {on_error}): {traceback.format_exc()}")
        path.unlink()
    return faults, ends


def read_long(case: Long, megabytes: int, folder: Path) -> list[str]:
    """Read a long file in a process of its own; the faults."""
    path = folder / case.name
    with path.open("wb") as file:
        file.write(case.start)
        for _ in range(megabytes):
            file.write(case.filling * (MIB // len(case.filling)))
        file.write(case.end)
    done = subprocess.run([sys.executable, "-c", READ, str(path)], cwd=ROOT, capture_output=True, text=True)
    path.unlink()
    if done.returncode or not done.stdout:
        return [f"{case.name}: exit {done.returncode}: {done.stderr or 'it was read'}"]
    peak, *told = done.stdout.splitlines()
    most = case.most_mb + case.most_share * megabytes
    print(f"{case.name} of {megabytes} MB: {peak} MB of memory, {most:.0f} are allowed; {json.dumps(told)}", flush=True)
    is_told = len(told) == len(case.says) and all(
        f"{path}{says}" in t.replace(" (record 1)", "") for t, says in zip(told, case.says, strict=True)
    )
    faults = [] if is_told else [f"{case.name}: told {told}"]
    return faults + ([] if int(peak) < most else [f"{case.name}: took {peak} MB of memory"])


def main(args: list[str]) -> int:
    """Read all of them."""
    own, _ = begin(args, FILES="20000", MB="200")
    with tempfile.TemporaryDirectory() as name:
        faults, ends = damaged(int(own["FILES"]), random.Random(int(own["SEED"])), Path(name))
        print(f"{own['FILES']} damaged files, each read twice: {dict(ends)}", flush=True)
        faults += [] if ends["read"] and ends["refused"] else ["too few files: not everything has happened"]
        for case in LONG:
            faults += read_long(case, int(own["MB"]), Path(name))
    return finish(faults, f"{ends['refused']} refusals, {ends['read']} readings, {len(LONG)} files of {own['MB']} MB")


if __name__ == "__main__":
    run_program(main)
