"""Many clients at once, some of which die: every request that survives ends exactly once, and nothing is left behind.

    python -m tests.stress.crowd [SEED=0] [CLIENTS=200] [REQUESTS=1000] [PROCESSES=10] [DELAY=0.005] [serve.name=value …]

The echo engine, whose right answers are known. One process in ten is killed outright while its clients are being answered, and of the
rest one request in nine has its sockets closed in the middle of its words: together a fifth. Fails unless every other one
got its text, some were refused by a full queue, and no slot, place or handle is left. The time until a full queue answers is printed and not judged.
"""

import asyncio
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.daemon import Served, served
from serve.client import Client, connect
from serve.errors import RequestError
from serve.figures import percentile
from serve.pieces import Delta, Done
from serve.runtime import Record
from tests.stress.program import begin, finish, run_program

CLOSED = 1 / 9
KILLED = 0.1
SETTLE_S = 60.0
LONG = "abcdefghi " * 90


def num_handles(pid: int) -> int:
    """Open files and sockets of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def processor_s(pid: int) -> tuple[float, float]:
    """Seconds that the main thread of a process has run, and that it has waited for a processor to run on (Linux)."""
    ran, waited, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    return int(ran) / 1e9, int(waited) / 1e9


async def client_of(record: Record, name: str, requests: int, draw: random.Random, tell: Any) -> None:
    """One client: its requests one after another, each told of at its beginning and its end."""
    client = await connect(record)
    for number in range(requests):
        closes_after = draw.randint(1, 8) if draw.random() < CLOSED else 0
        # Long enough that the middle is not the end.
        text = (
            f"{name}.{number} " + "".join(draw.choices("abc ñ🦊", k=draw.randint(10, 60))) + LONG * bool(closes_after)
        )
        tell({"asked": f"{name}.{number}"})
        ending = await ask(client, text, closes_after, tell)
        tell({"ended": f"{name}.{number}", "how": ending})
        if ending == "closed":
            client = await connect(record)
    client.__exit__()


async def ask(client: Client, text: str, closes_after: int, tell: Any) -> str:
    """Ask until the queue has room: `right`, `closed`, or what went wrong."""
    while True:
        begun, words, endings = time.monotonic(), [], 0
        try:
            async for piece in client.ask([{"role": "user", "content": text}]):
                endings += isinstance(piece, Done)
                words += [piece.text] if isinstance(piece, Delta) else []
                if closes_after and len(words) >= closes_after:
                    # Without a word of goodbye.
                    client.__exit__()
                    return "closed"
            return "right" if "".join(words) == text and endings == 1 else f"{endings} endings, {''.join(words)!r}"
        except RequestError as refusal:
            if refusal.code != "E_QUEUE_FULL":
                return f"{refusal.code}: {refusal}"
            tell({"refused_s": time.monotonic() - begun})
            await asyncio.sleep(refusal.detail["retry_after_ms"] / 1e3)


def member(record: Record, names: Sequence[str], requests: int, seed: int, path: str) -> None:
    """A process of several clients; what happens is written to a file, line by line."""
    with open(path, "a", buffering=1) as file:  # noqa: PTH123

        def tell(what: dict[str, Any]) -> None:
            file.write(json.dumps(what) + "\n")

        async def everybody() -> None:
            jobs = [client_of(record, n, requests, random.Random(f"{seed}.{n}"), tell) for n in names]
            for name, result in zip(names, await asyncio.gather(*jobs, return_exceptions=True), strict=True):
                if isinstance(result, BaseException):
                    tell({"ended": name, "how": repr(result)})

        asyncio.run(everybody())


def crowd(served: Served, own: dict[str, str]) -> tuple[list[str], str]:
    """Run the trial, print the figures; the faults that were found, and a summary."""
    clients, requests, processes, seed = (int(own[name]) for name in ("CLIENTS", "REQUESTS", "PROCESSES", "SEED"))
    asyncio.run(status_of(served))
    handles, draw = num_handles(served.record.pid), random.Random(seed)
    spawn, size = multiprocessing.get_context("spawn"), clients // processes
    paths, members, begun = [], [], time.monotonic()
    for number in range(processes):
        paths.append(str(served.folder / f"member-{number}"))
        names = [f"{number}.{i}" for i in range(size)]
        arguments = (served.record, names, requests // clients, seed, paths[-1])
        members.append(spawn.Process(target=member, args=arguments))
        members[-1].start()
    doomed = members[: max(1, round(KILLED * processes))]
    for process, path in zip(doomed, paths, strict=False):
        # In the middle of its requests.
        kill_after(process, Path(path), draw.randint(1, max(size * (requests // clients) // 3, 1)))
    for process in members:
        process.join()
    told = [[json.loads(line) for line in Path(path).read_text().splitlines() if line[-1:] == "}"] for path in paths]
    faults, summary = judge(told, len(doomed), requests // clients * size)
    ran, waited = processor_s(served.record.pid)
    print(
        f"{time.monotonic() - begun:.1f} s; the daemon ran for {ran:.1f} s, and {waited:.1f} s it waited for a processor"
    )
    return faults + settled(served, handles), summary


def kill_after(process: Any, path: Path, endings: int) -> None:
    """Kill a process outright when so many of its requests have ended."""
    while not (path.exists() and path.read_text().count('"ended"') >= endings):
        assert process.is_alive(), "the process that was to be killed has ended"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)


def judge(told: list[list[dict[str, Any]]], num_doomed: int, each: int) -> tuple[list[str], str]:
    """Count the endings of the surviving processes: the faults, and a summary."""
    ends = [line["how"] for lines in told[num_doomed:] for line in lines if "how" in line]
    lost = sum(("asked" in line) - ("ended" in line) for lines in told[:num_doomed] for line in lines)
    refused = [1e3 * line["refused_s"] for lines in told for line in lines if "refused_s" in line]
    right, closed = ends.count("right"), ends.count("closed")
    p50, p99, most = (percentile(refused, percent) for percent in (50, 99, 100))
    print(f"a full queue answers after p50 {p50:.1f} ms, p99 {p99:.1f} ms, at most {most:.1f} ms")
    faults = [f"ended otherwise: {how}" for how in sorted(set(ends) - {"right", "closed"})]
    expected = each * (len(told) - num_doomed)
    faults += [] if len(ends) == expected else [f"{len(ends)} endings of {expected} requests"]
    faults += [] if right and closed and lost and refused else ["too few clients: not everything has happened"]
    return faults, (
        f"{right} answers right, {closed} closed by us in the middle, {lost} open in the {num_doomed} of {len(told)} processes "
        f"that were killed, {len(refused)} refusals"
    )


async def status_of(served: Served) -> dict[str, Any]:
    """The daemon's STATUS."""
    with await connect(served.record) as client:
        return await client.status()


def settled(served: Served, handles: int) -> list[str]:
    """Wait until nothing is open; what stays open too long."""
    end = time.monotonic() + SETTLE_S
    while True:
        status, now = asyncio.run(status_of(served)), num_handles(served.record.pid)
        is_free = status["busy_slots"] == status["waiting"] == 0 and now <= handles + 4
        if is_free or time.monotonic() > end:
            break
        time.sleep(0.2)
    print(
        f"afterwards: {status['busy_slots']} busy slots, {status['waiting']} waiting; the daemon's handles {handles} -> {now}; "
        f"endings it counted: {status.get('requests')}"
    )
    return [] if is_free else ["something is left open"]


def main(args: list[str]) -> int:
    """Run the trial with a daemon of its own."""
    own, words = begin(args, has_daemon=True, CLIENTS="200", REQUESTS="1000", PROCESSES="10", DELAY="0.005")
    with served("HOLD=echo", *words, delay=float(own["DELAY"])) as daemon:
        faults, summary = crowd(daemon, own)
        return finish(faults, summary, daemon.said())


if __name__ == "__main__":
    run_program(main)
