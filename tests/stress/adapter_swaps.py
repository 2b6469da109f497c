"""Many adapters loaded, unloaded and rewritten while they answer: nobody is ever answered by another one, or by an older one's cache.

    python -m bench.swaps RUN=runs/x [SEED=0] [ADAPTERS=24] [REQUESTS=100] [TOKENS=16] [DTYPE=fp32] [serve.name=value …]

The adapters are copies of one lora run whose B matrices are noise, drawn from the seed. What each has to say is found by an engine in this
process that loads it, answers once and forgets it. Then a daemon loads all; four clients ask it the same long question, each time of
another adapter, while one adapter after the other is unloaded and loaded again, and one folder is rewritten in place with
the weights of none of the others. Every answer says by which `name@digest` it was given, and must be that one's to the token. Exit code 1
unless all are, and no load, at rest or under swapping, took more than a second.
"""

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.serving import Served, chosen, pieces, served
from serve.client import Client, connect
from serve.engine import Engine, Sampling
from serve.engine_process import build
from serve.errors import RequestError
from serve.figures import percentile
from serve.load import Load
from serve.pieces import Accepted, Delta
from serve.settings import PREFIX, Settings
from serve.settings import parse as parse_settings
from serve.submission import Submission

CLIENTS = 4
LOAD_S = 1.0
# Of the noise, as a multiple of what was trained: enough that hardly two adapters say the same.
STRENGTH = 32.0
ADAPTER = "adapter/adapter_model.safetensors"
# Long, and the same for all: rows that one adapter has read would be taken for another's if they were told apart by tokens alone.
QUESTION = [
    {
        "role": "user",
        "content": "Please read my order back to me, all of it: " + "two large lattes with oat milk, one bagel, " * 12,
    }
]


@dataclass
class Found:
    """What happened: answers by what became of them, seconds of each load, keys that have answered."""

    answers: Counter[str] = field(default_factory=Counter)
    loads: list[float] = field(default_factory=list)
    loads_at_rest: list[float] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


def write(run: Path, folder: Path, seed: int) -> None:
    """A finished run like `run`, but its B matrices are noise."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors, draw = load_file(run / ADAPTER), torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float32)
            tensors[name] = (STRENGTH * tensor.float().std() * noise).to(tensor.dtype)
    if not folder.exists():
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    part = folder / f"{ADAPTER}.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(folder / ADAPTER)


def cold(engine: Engine, run: Path, num_tokens: int) -> tuple[str, list[int]]:
    """(key, answer) of an adapter in an engine that holds no other one's words."""
    key = engine.load_adapter(str(run)).key
    engine.start(0, engine.prompt_ids(QUESTION), Sampling(), key)
    token = None
    while token is None:
        token = engine.prefill([0])[0].token
    answer: list[int] = []
    while token not in engine.info.stop_ids:
        answer.append(token)
        if len(answer) == num_tokens:
            break
        token = engine.step()[0]
    engine.free(0)
    engine.unload_adapter(key)
    return key, answer


async def asker(
    number: int, served: Served, names: Sequence[str], expected: dict[str, list[int]], left: list[int], found: Found
) -> None:
    """Ask for one adapter after another until enough was asked."""
    draw = random.Random(number)
    with await connect(served.record) as client:
        while left:
            name = draw.choice(names)
            submission = Submission(QUESTION, max_tokens=left[0], wants_ids=True, adapter=name)
            key = ""
            ids: list[int] = []
            try:
                async for piece in pieces(client, submission):
                    key = piece.adapter if isinstance(piece, Accepted) else key
                    ids += piece.ids if isinstance(piece, Delta) else ()
            except RequestError as refusal:
                # It is unloaded at the moment.
                found.answers[refusal.code] += 1
                await asyncio.sleep(0.05)
                continue
            if left:
                left.pop()
            found.keys.add(key)
            is_right = ids[: len(expected[key])] == expected[key] and key.startswith(f"{name}@")
            found.answers["right" if is_right else "WRONG"] += 1
            found.wrong += [] if is_right else [f"{name} as {key}: {ids} and not {expected[key]}"]


async def swapper(client: Client, folders: Sequence[Path], rewrite: Any, left: list[int], found: Found) -> None:
    """Unload and load one after another, and rewrite one when half is done, until the others have asked enough."""
    draw, total, is_rewritten = random.Random(1), len(left), False
    while left:
        folder = draw.choice(folders)
        if not is_rewritten and len(left) <= total // 2:
            is_rewritten, folder = True, folders[0]
            await asyncio.to_thread(rewrite)
        else:
            try:
                await client.unload(folder.name)
            except RequestError as refusal:
                # It is answering.
                found.answers[f"unload: {refusal.code}"] += 1
        await load(client, folder, found)
        await asyncio.sleep(0.2)


async def load(client: Client, folder: Path, found: Found) -> None:
    """Load, and look at the clock."""
    begun = time.monotonic()
    await client.load(str(folder))
    found.loads.append(time.monotonic() - begun)


async def swap(
    served: Served, folders: Sequence[Path], rewrite: Any, expected: dict[str, list[int]], own: dict[str, str]
) -> Found:
    """All of it, against a daemon."""
    first, found, left = Found(), Found(), [int(own["TOKENS"])] * int(own["REQUESTS"])
    with await connect(served.record) as client:
        for folder in folders:
            await load(client, folder, first)
        print(f"{len(folders)} loads of a daemon at rest: {spread(first.loads)}", flush=True)
        names = [folder.name for folder in folders]
        askers = [asker(number, served, names, expected, left, found) for number in range(CLIENTS)]
        await asyncio.gather(swapper(client, folders, rewrite, left, found), *askers)
        served_now = await client.adapters()
    in_engine = [adapter["load_s"] for adapter in served_now if adapter["load_s"]]
    print(f"served at the end: {len(served_now)}; their loads in the engine itself: {spread(in_engine)}")
    found.loads_at_rest = first.loads
    return found


def spread(seconds: Sequence[float]) -> str:
    """The median and the longest, in words."""
    return f"p50 {percentile(seconds, 50):.2f} s, at most {max(seconds):.2f} s"


def main(args: list[str]) -> int:
    """Make the adapters, find their cold answers, and swap."""
    own, words = chosen(args, SEED="0", ADAPTERS="24", REQUESTS="100", TOKENS="16", RUN="", DTYPE="fp32")
    run, seed, number = Path(own["RUN"]).absolute(), int(own["SEED"]), int(own["ADAPTERS"])
    settings = parse_settings([word for word in words if word.startswith(PREFIX)]) if words else Settings()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, f"adapter-{i}") for i in range(number)]
        rewritten = Path(name, "new", folders[0].name)
        rewritten.parent.mkdir()
        for i, folder in enumerate([*folders, rewritten]):
            write(run, folder, seed * 1000 + i)
        engine = build(Load((str(run),), "adapters", own["DTYPE"], settings), lambda message: None)
        expected = dict(cold(engine, folder, int(own["TOKENS"])) for folder in [*folders, rewritten])
        different = len({tuple(answer) for answer in expected.values()})
        print(f"seed {seed}: {len(expected)} adapters, {different} different answers, when cold", flush=True)
        # Else a wrong answer would look right.
        assert different > len(expected) / 2, "the adapters say too much alike; try another seed"
        del engine
        with served(f"RUN={run}", "HOLD=adapters", f"DTYPE={own['DTYPE']}", *words) as daemon:
            new = seed * 1000 + number
            found = asyncio.run(swap(daemon, folders, lambda: write(run, folders[0], new), expected, own))
            print(
                f"{dict(found.answers)}; {len(found.keys)} keys answered; {len(found.loads)} loads meanwhile: {spread(found.loads)}"
            )
            slowest = max(found.loads_at_rest + found.loads)
            faults = found.wrong + ([f"a load took {slowest:.1f} s"] if slowest > LOAD_S else [])
            if faults:
                print("\n".join(["FAILED", *faults, daemon.said()]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
