"""How fast a run is served on this machine, beside other ways to answer the same questions with the same model.

    python -m bench.serve RUN=runs/x [HOLD=adapters] [DTYPE=auto] [serve.name=value …]       through the daemon, sockets and clients
    python -m bench.serve SHAPE=llama-7b [DTYPE=bf16|nf4] [serve.name=value …]               random weights, the engine alone
    options: [STREAMS=1,4,16,64] [TOKENS=64] [ROUNDS=3] [WITH=generate,continuous] [GGUF=model.gguf] [OUT=serve.json]

All take turns in one run with the same prompts, none of which was asked before (ours has read the system turn, and reads it no
more); medians over the rounds are told. An answer ends at TOKENS, or at the model's stop token; tokens that were produced are
counted, the stop token not among them. The limit of the bandwidth is what copying a large tensor reaches in the same run, divided
by the bytes of the weights that one token reads.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.contenders import Bench, with_run, with_shape
from bench.daemon import chosen, table
from serve.errors import UserError
from serve.figures import percentile


def measure(bench: Bench, streams: list[int], rounds: int, num_tokens: int) -> dict[str, dict[int, list[Any]]]:
    """Results of every contender by number of streams; all take turns in every round. The first round is left out."""
    found: dict[str, dict[int, list[Any]]] = {name: {n: [] for n in streams} for name in bench.contenders}
    fresh = itertools.count()
    for number, round_number in itertools.product(streams, range(rounds + 1)):
        prompts = [bench.prompts(next(fresh)) for _ in range(number)]
        for name, answer in bench.contenders.items():
            result = answer(prompts, num_tokens)
            if round_number:
                found[name][number].append(result)
                print(f"{number} streams, round {round_number}: {name} {result.rate:.1f} tokens/s", file=sys.stderr)
    return found


def figures(results: list[Any]) -> dict[str, float]:
    """Medians over the rounds of one contender with one number of streams; times in milliseconds."""

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
    from bench.baselines import copy_bandwidth, weight_bytes

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
