"""The contenders that `bench.serve` compares: ours and others', each answers the same questions with the same model."""

import asyncio
import contextlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.daemon import Served, pieces, questions, served
from serve.client import connect
from serve.engine import BASE
from serve.errors import UserError
from serve.load import Load
from serve.pieces import Delta
from serve.settings import PREFIX, Settings
from serve.settings import parse as parse_settings
from serve.submission import Submission

# Threads wait as they do in an engine process of the daemon's; read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@dataclass
class Bench:
    """Contenders by name, `ours` first, each (prompts, tokens) -> `baselines.Result`.

    `prompts` makes a prompt, as ids, of a number: none is asked twice, for ours remembers what it has read.
    """

    model: Any
    what: str
    num_slots: int
    prompts: Callable[[int], list[int]]
    ours: str
    contenders: dict[str, Any] = field(default_factory=dict)


# Ours: through the daemon.


def through_daemon(daemon: Served, adapter: str | None, asked: dict[tuple[int, ...], Any]) -> Any:
    """As many clients as prompts, each with its own sockets; `asked` are the conversations that became the prompts."""
    from bench.baselines import Result

    async def client_of(submission: Any, begun: list[float]) -> list[float]:
        with await connect(daemon.record) as client:
            begun.append(time.perf_counter())
            found = pieces(client, submission)
            return [time.perf_counter() async for piece in found if isinstance(piece, Delta) and piece.ids]

    async def all_clients(prompts: Any, num_tokens: int) -> Any:
        begun: list[float] = []
        submissions = [
            Submission(asked[tuple(prompt)], max_tokens=num_tokens, adapter=adapter, wants_ids=True)
            for prompt in prompts
        ]
        found = await asyncio.gather(*(client_of(submission, begun) for submission in submissions))
        start = min(begun)
        stamps = [[moment - start for moment in moments] for moments in found]
        return Result(max(s[-1] for s in stamps), stamps)

    return lambda prompts, num_tokens: asyncio.run(all_clients(prompts, num_tokens))


# What is set up.


@contextlib.contextmanager
def with_run(own: dict[str, str], words: list[str]) -> Iterator[Bench]:
    """A daemon that serves a run, and the same model again in this process for the baselines."""
    from serve.held import hold_runs

    given = dict(word.split("=", 1) for word in words)
    hold = given.setdefault("HOLD", "adapters")
    load = Load((given["RUN"],), hold, given.get("DTYPE", "auto"), Settings(memory=0.4))
    held = hold_runs(load, lambda *_: None)
    words = [f"{name}={value}" for name, value in given.items()]
    if held.model.device.type == "cuda" and f"{PREFIX}memory" not in given:
        words.append(f"{PREFIX}memory=0.5")
    with served(*words) as daemon:
        info = asyncio.run(_info(daemon))
        adapter = BASE if any(a["name"] == BASE for a in info["adapters"]) else None
        asked: dict[tuple[int, ...], Any] = {}

        def prompt(number: int) -> list[int]:
            messages = questions(1, first=number)[0].messages
            ids = held.prompt_ids(messages)
            asked[tuple(ids)] = messages
            return ids

        what = f"{given['RUN']} ({info['model']}, {info['hold']}, {info['dtype']}, adapter {adapter or info['adapters'][0]['name']})"
        bench = Bench(held.model, what, info["num_slots"], prompt, "daemon and clients")
        bench.contenders[bench.ours] = through_daemon(daemon, adapter, asked)
        add_baselines(bench, own, held.stop_ids)
        yield bench


async def _info(daemon: Served) -> dict[str, Any]:
    with await connect(daemon.record) as client:
        return client.info


@contextlib.contextmanager
def with_shape(own: dict[str, str], words: list[str]) -> Iterator[Bench]:
    """A model of this shape with random weights, made where it runs; nobody can talk to it, so there is no daemon."""
    import torch

    from bench.bare_engine import bare, random_model
    from serve.held import Held
    from serve.slot_engine import SlotEngine

    given = dict(word.split("=", 1) for word in words)
    dtype = given.pop("DTYPE", "bf16")
    settings = parse_settings([word for word in words if word.startswith(PREFIX)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(own["SHAPE"], dtype, device)
    # On a processor the engine changes how the layers of its model multiply: the baselines get one of their own.
    unchanged = model if device.type == "cuda" else random_model(own["SHAPE"], dtype, device)
    held = Held(model, None, own["SHAPE"], "merged", "fp32" if dtype == "fp32" else "bf16")
    engine = SlotEngine(held, settings)
    while engine.reserve():
        pass

    def prompt(number: int) -> list[int]:
        return torch.randint(
            3, unchanged.config.vocab_size, (64,), generator=torch.Generator().manual_seed(number)
        ).tolist()

    bench = Bench(unchanged, f"{own['SHAPE']} ({dtype}, random weights)", engine.info.num_slots, prompt, "engine alone")
    bench.contenders[bench.ours] = bare(engine)
    add_baselines(bench, own, ())
    yield bench
    print(f"CUDA graphs: {engine.info.graphs}")


def add_baselines(bench: Bench, own: dict[str, str], stop_ids: Any) -> None:
    """Those that were asked for and are there; a line for each that is not."""
    from bench import baselines

    makers = {"generate": baselines.generate, "continuous": baselines.continuous}
    for name in filter(None, own["WITH"].split(",")):
        if name not in makers:
            raise UserError(f"WITH={name}: unknown; choose from: {', '.join(makers)}")
        bench.contenders[name] = makers[name](bench.model, stop_ids)
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is left out: llama-cpp-python is not installed")
    elif not own["GGUF"]:
        print("llama.cpp is left out: it reads its own format; try GGUF=model.gguf")
    else:
        bench.contenders["llama.cpp"] = baselines.llama_cpp(own["GGUF"])
