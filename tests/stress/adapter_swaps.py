"""Many adapters loaded, unloaded and rewritten while they answer: nobody is ever answered by another one, or by an older one's cache.

    python -m tests.stress.adapter_swaps [SEED=0] [ADAPTERS=24] [REQUESTS=100] [TOKENS=16] [RUN=runs/x] [DTYPE=fp32] [serve.name=value …]

The adapters are copies of one lora run (without RUN a tiny one, trained for this) whose B matrices are noise, drawn from the seed.
What each has to say is found by loading it alone, asking once and unloading it. Then all are loaded; four clients ask the same long
question, each time of another adapter, while one adapter after the other is unloaded and loaded again, and one folder is
rewritten in place with the weights of none of the others. Every answer says by which `name@digest` it was given. Fails unless all
are that one's to the token. The time that loads take is printed and not judged.
"""

import asyncio
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.daemon import Served, pieces, served
from serve.client import Client, connect
from serve.errors import RequestError
from serve.figures import percentile
from serve.pieces import Accepted, Delta, Done
from serve.submission import Submission
from tests.stress.program import begin, finish, run_program
from tests.stress.trainings import tiny_model, train

CLIENTS, LEAST_SWAPS = 4, 4
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
class Tally:
    """Answers by what became of them, seconds of each load, keys that have answered, reloads meanwhile, wrong answers."""

    answers: Counter[str] = field(default_factory=Counter)
    loads: list[float] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    swaps: int = 0
    is_rewritten: bool = False
    wrong: list[str] = field(default_factory=list)


@dataclass
class Trial:
    """A daemon, the adapters it is to serve, their right answers by key, tokens of each, and questions that are left."""

    served: Served
    folders: Sequence[Path]
    rewrite: Callable[[], None]
    num_tokens: int
    left: int
    seed: int
    expected: dict[str, list[int]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    @property
    def is_done(self) -> bool:
        """True when enough was asked, and swapped and rewritten meanwhile."""
        return self.left <= 0 and self.tally.swaps >= LEAST_SWAPS and self.tally.is_rewritten


def write(run: Path, folder: Path, seed: int) -> None:
    """Write a finished run like `run`, but its B matrices are noise."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    tensors, draw = load_file(run / ADAPTER), np.random.default_rng(seed)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = (STRENGTH * tensor.std() * draw.standard_normal(tensor.shape)).astype(tensor.dtype)
    if not folder.exists():
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    part = folder / f"{ADAPTER}.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(folder / ADAPTER)


async def ask(client: Client, name: str, num_tokens: int) -> tuple[str, list[int], int]:
    """(the key of the adapter that answered, its tokens, how many tokens of the question it had read before)."""
    key, ids, reused = "", list[int](), 0
    async for piece in pieces(client, Submission(QUESTION, max_tokens=num_tokens, wants_ids=True, adapter=name)):
        if isinstance(piece, Accepted):
            key = piece.adapter
        elif isinstance(piece, Delta):
            ids += piece.ids
        elif isinstance(piece, Done):
            reused = piece.usage["reused_tokens"]
    return key, ids, reused


async def find_expected(client: Client, trial: Trial, folders: Sequence[Path]) -> None:
    """Load each adapter alone, ask it once, and unload it."""
    for folder in folders:
        await load(client, folder, trial.tally)
        key, ids, reused = await ask(client, folder.name, trial.num_tokens)
        trial.expected[key] = ids
        # Else it answers by what another one has read, now and later.
        trial.tally.wrong += [f"{key} was new and had read {reused} tokens"] if reused else []
        await client.unload(folder.name)


async def asker(number: int, trial: Trial) -> None:
    """Ask for one adapter after another until enough was asked."""
    draw, tally = random.Random(f"{trial.seed}.{number}"), trial.tally
    with await connect(trial.served.record) as client:
        while not trial.is_done:
            name = draw.choice(trial.folders).name
            try:
                key, ids, _ = await ask(client, name, trial.num_tokens)
            except RequestError as refusal:
                # It is unloaded at the moment.
                tally.answers[refusal.code] += 1
                await asyncio.sleep(0.05)
                continue
            trial.left -= 1
            tally.keys.add(key)
            is_right = ids == trial.expected.get(key) and key.startswith(f"{name}@")
            tally.answers["right" if is_right else "WRONG"] += 1
            tally.wrong += [] if is_right else [f"{name} as {key}: {ids} and not {trial.expected.get(key)}"]


async def swapper(client: Client, trial: Trial) -> None:
    """Unload and load one after another, and rewrite one when half is done, until the others have asked enough."""
    draw, tally, half = random.Random(trial.seed), trial.tally, trial.left // 2
    while not trial.is_done:
        folder = draw.choice(trial.folders)
        if not tally.is_rewritten and trial.left <= half:
            tally.is_rewritten, folder = True, trial.folders[0]
            await asyncio.to_thread(trial.rewrite)
        else:
            try:
                await client.unload(folder.name)
            except RequestError as refusal:
                # It is answering.
                tally.answers[f"unload: {refusal.code}"] += 1
            else:
                tally.swaps += 1
        await load(client, folder, tally)
        await asyncio.sleep(0.05)


async def load(client: Client, folder: Path, tally: Tally) -> None:
    """Load, and look at the clock."""
    begun = time.monotonic()
    await client.load(str(folder))
    tally.loads.append(time.monotonic() - begun)


async def swap(trial: Trial, rewritten: Path) -> None:
    """All of it, against a daemon."""
    tally = trial.tally
    with await connect(trial.served.record) as client:
        await find_expected(client, trial, [*trial.folders, rewritten])
        different = len({tuple(ids) for ids in trial.expected.values()})
        print(
            f"{len(trial.expected)} adapters, {different} different answers, each loaded alone: {spread(tally.loads)}",
            flush=True,
        )
        # Else a wrong answer would look right.
        assert different > len(trial.expected) / 2, "the adapters say too much alike; try another seed"
        for folder in trial.folders:
            await load(client, folder, tally)
        tally.loads.clear()
        await asyncio.gather(swapper(client, trial), *(asker(number, trial) for number in range(CLIENTS)))
        served_now = await client.adapters()
    in_engine = [adapter["load_s"] for adapter in served_now if adapter["load_s"]]
    print(f"{len(tally.loads)} loads meanwhile: {spread(tally.loads)}; in the engine itself: {spread(in_engine)}")


def spread(seconds: Sequence[float]) -> str:
    """The median and the longest, in words."""
    return f"p50 {percentile(seconds, 50):.2f} s, at most {max(seconds):.2f} s"


def a_run(given: str, folder: Path) -> Path:
    """The finished lora run that was given, or a tiny one, trained now."""
    if not given:
        train(tiny_model(str(folder)), folder / "run", "optim.max_steps=4", "eval.examples=1")
    return Path(given).absolute() if given else folder / "run"


def main(args: list[str]) -> int:
    """Make the adapters, find their right answers, and swap."""
    own, words = begin(args, has_daemon=True, ADAPTERS="24", REQUESTS="100", TOKENS="16", RUN="", DTYPE="fp32")
    seed, number = int(own["SEED"]), int(own["ADAPTERS"])
    with tempfile.TemporaryDirectory() as name:
        run = a_run(own["RUN"], Path(name))
        folders = [Path(name, f"adapter-{i}") for i in range(number)]
        rewritten = Path(name, "new", folders[0].name)
        rewritten.parent.mkdir()
        for i, folder in enumerate([*folders, rewritten]):
            write(run, folder, seed * 1000 + i)
        with served(f"RUN={run}", "HOLD=adapters", f"DTYPE={own['DTYPE']}", *words) as daemon:
            rewrite = partial(write, run, folders[0], seed * 1000 + number)
            trial = Trial(daemon, folders, rewrite, int(own["TOKENS"]), int(own["REQUESTS"]), seed)
            asyncio.run(swap(trial, rewritten))
            tally = trial.tally
            return finish(
                tally.wrong,
                f"{len(trial.expected)} adapters, {tally.swaps} swaps, {len(tally.keys)} keys answered; {dict(tally.answers)}",
                daemon.said(),
            )


if __name__ == "__main__":
    run_program(main)
