"""Kill a client outright while it writes a conversation, and see whether each turn that was finished is there again.

    python -m tests.stress.client_kills [SEED=0] [KILLS=100]

A child process writes through `ConversationFile`, a few bytes at a time, and reports each event whose `append` returned. Half of
the kills come when a random byte is about to be written, the others at a random time. Half of the children go on with what
the last kill left. Then copies of the file are cut off at random bytes. Prints every kill. Fails unless every finished turn was
restored each time.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

from serve.chat.conversation import ending, replay
from serve.chat.conversation_events import Begin, Edit, Event, Regenerate, System, Undo, User, Withdraw
from serve.chat.conversation_file import ConversationFile
from serve.errors import UserError
from tests.stress.program import begin, finish, run_program

NAME = "killed"
# `Begin`, `System` and the question after them.
MOST_UNREPORTED = 3
MOST_EVENTS = 40
LATEST_S = 0.02
# About as much as the child writes until its other deaths.
MOST_BYTES = 30_000
CUTS = 20
WORDS = ["hello", "ñandú", "🦊", '"quoted"', "\n", "{}", "```"]


def talk(seed: int, *, is_open: bool) -> Iterator[Event]:
    """The events that a client of that seed adds to a conversation, without an end; `is_open`: the last kill left an open question."""
    draw = random.Random(seed)
    # A line shorter than what a kill leaves of the one before it.
    if is_open:
        yield Withdraw()
    yield Begin("runs/x", "tiny", "x", float(seed))
    yield System("")
    while True:
        yield User(" ".join(draw.choices(WORDS, k=draw.randint(1, 20))))
        yield ending(" ".join(draw.choices(WORDS, k=draw.randint(1, 800))), is_interrupted=draw.random() < 0.2)
        if draw.random() < 0.3:
            yield Regenerate() if draw.random() < 0.5 else Edit("another question")
            yield ending("once more", is_interrupted=False)
        elif draw.random() < 0.2:
            yield Undo()


def write(folder: Path, seed: int, reports: Connection, last_byte: int | None) -> None:
    """The child: begin or go on, and report how many events are finished, until it has to write that byte of the file."""
    whole_write = os.pwrite

    def write_little(file: int, data: bytes, offset: int) -> int:
        if last_byte is not None and offset >= last_byte:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole_write(file, data[: 1 + offset % 8], offset)

    os.pwrite = write_little  # type: ignore[assignment]
    file = open_last(folder)
    for number, event in enumerate(talk(seed, is_open=file.conversation.open_question is not None), start=1):
        assert not file.append(event)
        # A setting is written with the turn that follows it.
        if not isinstance(event, Begin | System):
            reports.send_bytes(str(number).encode())


def open_last(folder: Path) -> ConversationFile:
    """The file that the last kill left, or a new conversation."""
    if (folder / f"{NAME}.jsonl").exists():
        return ConversationFile.resume(folder, NAME)
    file = ConversationFile(folder)
    file.save(NAME)
    return file


def kill_one(folder: Path, seed: int, draw: random.Random) -> int:
    """Start a child and kill it at a random byte or a random time; returns how many events it has reported."""
    path = folder / f"{NAME}.jsonl"
    size = path.stat().st_size if path.exists() else 0
    last_byte = size + draw.randrange(MOST_BYTES) if draw.random() < 0.5 else None
    reports, far_end = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=write, args=(folder, seed, far_end, last_byte))
    child.start()
    far_end.close()
    finished = 0
    if last_byte is None:
        for _ in range(draw.randrange(MOST_EVENTS)):
            finished = int(reports.recv_bytes())
        time.sleep(draw.uniform(0, LATEST_S))
        child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL, "the child died of something else"
    # What the child reported before it died.
    with contextlib.suppress(EOFError):
        while report := reports.recv_bytes():
            finished = int(report)
    return finished


def restored(folder: Path) -> list[Event]:
    """The events that are there again; none where the file cannot be read, and it is told why."""
    try:
        file = open_last(folder)
    except UserError as fault:
        print(f"error: {fault}")
        return []
    file.close()
    return file.conversation.events


def cut_well(data: bytes, said: list[Event], draw: random.Random) -> bool:
    """True if a copy that ends at a random byte has all the lines before it."""
    size = draw.randint(0, len(data))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{NAME}.jsonl").write_bytes(data[:size])
        return restored(Path(folder)) == said[: max(data[:size].count(b"\n") - 1, 0)]


def main(args: list[str]) -> int:
    """Kill so many clients, and cut off what each has left at some more places."""
    own, _ = begin(args, KILLS="100")
    kills, draw = int(own["KILLS"]), random.Random(int(own["SEED"]))
    good = torn = cuts = events = 0
    with tempfile.TemporaryDirectory() as root:
        folder, said = Path(root), list[Event]()
        path = folder / f"{NAME}.jsonl"
        for number in range(1, kills + 1):
            if draw.random() < 0.5 or not path.exists():
                path.unlink(missing_ok=True)
                said = []
            seed, is_open = draw.getrandbits(32), replay(said).open_question is not None
            finished = kill_one(folder, seed, draw)
            events += finished
            data = path.read_bytes() if path.exists() else b""
            is_torn = bool(data) and not data.endswith(b"\n")
            there = restored(folder)
            added = len(there) - len(said)
            expected = [*said, *islice(talk(seed, is_open=is_open), max(added, 0))]
            # The kill may have come between the disk and the report, or in a write of settings and a question.
            is_good = there == expected and finished <= added <= finished + MOST_UNREPORTED
            good, torn = good + is_good, torn + is_torn
            cuts += sum(cut_well(data, there, draw) for _ in range(CUTS))
            where = f"byte {len(data)}{', in a line' if is_torn else ''}"
            print(f"{number:3}  {len(said)} + {finished} events finished, {where}: {len(there)} restored", flush=True)
            said = there
            if not is_good:
                path.unlink(missing_ok=True)
    faults = [f"{kills - good} kills lost a finished turn, or brought back another one"] if good < kills else []
    faults += [f"{kills * CUTS - cuts} files that were cut off lost a whole line"] if cuts < kills * CUTS else []
    return finish(
        faults,
        f"{kills} kills ({torn} in the middle of a line), {events} events finished; {kills * CUTS} files cut off at a random byte",
    )


if __name__ == "__main__":
    run_program(main)
