"""How fast a run is served on this machine, beside other ways to answer the same questions with the same model.

    python -m bench.serve RUN=runs/x [HOLD=adapters] [DTYPE=auto] [serve.name=value …]       through the daemon, sockets and clients
    python -m bench.serve SHAPE=llama-7b [DTYPE=bf16|nf4] [serve.name=value …]               random weights, the engine alone
    options: [STREAMS=1,4,16,64] [TOKENS=64] [ROUNDS=3] [WITH=generate,continuous] [GGUF=model.gguf] [OUT=serve.json]

All take turns in one run with the same prompts, none of which was asked before (ours has read the system turn, and reads it no
more); medians over the rounds are told. An answer ends at TOKENS, or at the model's stop token; tokens that were produced are
counted, the stop token not among them. The limit of the bandwidth is what copying a large tensor reaches in the same run, divided
by the bytes of the weights that one token reads.
"""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.serving import Served, chosen, pieces, served, table
from bench.streams import questions
from serve.client import connect
from serve.engine import BASE
from serve.errors import UserError
from serve.figures import percentile
from serve.load import Load
from serve.pieces import Delta
from serve.settings import PREFIX, Settings
from serve.settings import parse as parse_settings
from serve.submission import Submission

# Threads wait as they do in an engine process of the daemon's; read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@dataclass
class Bench:
    """What is compared: ways to answer by name, `ours` first, each (prompts, tokens) -> `rivals.Result`.

    `prompts` makes a prompt, as ids, of a number: none is asked twice, for ours remembers what it has read.
    """

    model: Any
    what: str
    num_slots: int
    prompts: Callable[[int], list[int]]
    ours: str
    ways: dict[str, Any] = field(default_factory=dict)


# Ours: through the daemon.


def through_daemon(daemon: Served, adapter: str | None, asked: dict[tuple[int, ...], Any]) -> Any:
    """As many clients as prompts, each with its own sockets; `asked` are the conversations that became the prompts."""
    from bench.rivals import Result

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
    """A daemon that serves a run, and the same model again in this process for the rivals."""
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
        bench.ways[bench.ours] = through_daemon(daemon, adapter, asked)
        add_rivals(bench, own, held.stop_ids)
        yield bench


async def _info(daemon: Served) -> dict[str, Any]:
    with await connect(daemon.record) as client:
        return client.info


@contextlib.contextmanager
def with_shape(own: dict[str, str], words: list[str]) -> Iterator[Bench]:
    """A model of this shape with random weights, made where it runs; nobody can talk to it, so there is no daemon."""
    import torch

    from bench.alone import alone, random_model
    from serve.held import Held
    from serve.slot_engine import SlotEngine

    given = dict(word.split("=", 1) for word in words)
    dtype = given.pop("DTYPE", "bf16")
    settings = parse_settings([word for word in words if word.startswith(PREFIX)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(own["SHAPE"], dtype, device)
    # On a processor the engine changes how the layers of its model multiply: the rivals get one of their own.
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
    bench.ways[bench.ours] = alone(engine)
    add_rivals(bench, own, ())
    yield bench
    print(f"CUDA graphs: {engine.info.graphs}")


def add_rivals(bench: Bench, own: dict[str, str], stop_ids: Any) -> None:
    """Those that were asked for and are there; a line for each that is not."""
    from bench import rivals

    makers = {"generate": rivals.generate, "continuous": rivals.continuous}
    for name in filter(None, own["WITH"].split(",")):
        if name not in makers:
            raise UserError(f"WITH={name}: unknown; choose from: {', '.join(makers)}")
        bench.ways[name] = makers[name](bench.model, stop_ids)
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is left out: llama-cpp-python is not installed")
    elif not own["GGUF"]:
        print("llama.cpp is left out: it reads its own format; try GGUF=model.gguf")
    else:
        bench.ways["llama.cpp"] = rivals.llama_cpp(own["GGUF"])


# Measuring.


def measure(bench: Bench, streams: list[int], rounds: int, num_tokens: int) -> dict[str, dict[int, list[Any]]]:
    """Results of every way by number of streams; all ways take turns in every round. The first round is left out."""
    found: dict[str, dict[int, list[Any]]] = {name: {n: [] for n in streams} for name in bench.ways}
    fresh = itertools.count()
    for number, round_number in itertools.product(streams, range(rounds + 1)):
        prompts = [bench.prompts(next(fresh)) for _ in range(number)]
        for name, way in bench.ways.items():
            result = way(prompts, num_tokens)
            if round_number:
                found[name][number].append(result)
                print(f"{number} streams, round {round_number}: {name} {result.rate:.1f} tokens/s", file=sys.stderr)
    return found


def figures(results: list[Any]) -> dict[str, float]:
    """Medians over the rounds of one way with one number of streams; times in milliseconds."""

    def median(of: Any) -> float:
        return round(statistics.median(of(r) for r in results), 2)

    return {
        "tokens_per_second": median(lambda r: r.rate),
        "first_token_p50_ms": median(lambda r: 1e3 * percentile(r.firsts, 50)),
        "first_token_max_ms": median(lambda r: 1e3 * max(r.firsts)),
        "inter_token_p50_ms": median(lambda r: 1e3 * percentile(r.gaps, 50)),
        "inter_token_p99_ms": median(lambda r: 1e3 * percentile(r.gaps, 99)),
        "tokens": median(lambda r: r.tokens),
    }


def report(bench: Bench, found: dict[str, dict[int, list[Any]]], out: str) -> None:
    """Print the table, and write the JSON."""
    from bench.rivals import copy_bandwidth, weight_bytes

    told = {name: {n: figures(results) for n, results in by_number.items()} for name, by_number in found.items()}
    head = ("", "streams", "tokens/s", "ours / it", "first token ms", "slowest", "between ms", "p99")
    rows = []
    for number in next(iter(told.values())):
        for name, by_number in told.items():
            f, ours = by_number[number], told[bench.ours][number]
            times = (f["first_token_p50_ms"], f["first_token_max_ms"], f["inter_token_p50_ms"], f["inter_token_p99_ms"])
            share = ours["tokens_per_second"] / f["tokens_per_second"]
            rows.append((name, number, f["tokens_per_second"], f"{share:.2f}", *times))
    bandwidth, size = copy_bandwidth(bench.model.device), weight_bytes(bench.model)
    print(bench.what)
    print(table(head, rows))
    one = told[bench.ours].get(1)
    limit = bandwidth / size
    if one:
        rate = 1e3 / one["inter_token_p50_ms"]
        print(
            f"one stream: {rate:.1f} tokens/s after the first; copying reaches {bandwidth / 1e9:.1f} GB/s and a token reads {size / 1e9:.3f} GB: "
            f"at most {limit:.1f} tokens/s, {100 * rate / limit:.0f} % of it reached"
        )
    if (most := max(told[bench.ours])) > bench.num_slots:
        print(f"there are {bench.num_slots} slots: of {most} clients the others wait; try serve.slots={most}")
    summary = {
        "what": bench.what,
        "copy_bytes_per_second": bandwidth,
        "weight_bytes": size,
        "slots": bench.num_slots,
        "figures": told,
    }
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"written: {path}")


def main(args: list[str]) -> int:
    """Measure everything that was asked for."""
    own, words = chosen(
        args, SHAPE="", STREAMS="1,4,16,64", TOKENS="64", ROUNDS="3", WITH="generate,continuous", GGUF="",
        OUT="bench/results/serve.json",
    )  # fmt: skip
    streams = [int(number) for number in own["STREAMS"].split(",")]
    if not own["SHAPE"] and not any(word.startswith("RUN=") for word in words):
        raise UserError("nothing to serve; try: make bench-serve ARGS=RUN=runs/x, or ARGS=SHAPE=llama-7b")
    prepared = with_shape if own["SHAPE"] else with_run
    with prepared(own, words) as bench:
        report(bench, measure(bench, streams, int(own["ROUNDS"]), int(own["TOKENS"])), own["OUT"])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
