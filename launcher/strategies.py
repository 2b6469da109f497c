"""The strategies of `configs/strategy/`, and which of them is legal for what. docs/strategies.md is printed from here.

python -m launcher.strategies > docs/strategies.md
"""

import functools
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from launcher.ranks import world_size
from launcher.variables import CONFIGS, one_process_only, shipped

# What `auto` tries, fastest first. ZeRO-2 moves as many bytes as plain data parallelism does and holds less
# (arXiv:1910.02054, section 7); stage 3 gathers the base in every pass, offloading also brings it from host memory.
FASTEST_FIRST = ("single", "zero2", "zero3", "zero3-offload")
METHODS = ("lora", "qlora", "ia3", "prefix")
DTYPES = ("bf16", "fp32")


@dataclass(frozen=True)
class Strategy:
    """How processes share a training. `stage` is DeepSpeed's ZeRO stage, 0 where DeepSpeed does not run.

    `is_offloaded`: the frozen base lies in host memory.
    """

    name: str
    stage: int = 0
    is_offloaded: bool = False

    @property
    def file(self) -> str:
        """The accelerate file."""
        return str(CONFIGS / "strategy" / f"{self.name}.yaml")


@functools.cache
def named(name: str) -> Strategy:
    """The strategy of this name, as its file says."""
    facts = deepspeed_facts(name)
    return Strategy(name, facts.get("zero_stage", 0), facts.get("offload_param_device", "none") != "none")


def deepspeed_facts(name: str) -> dict[str, Any]:
    """The `deepspeed_config` of a strategy's file, empty where DeepSpeed does not run."""
    text = (CONFIGS / "strategy" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text).get("deepspeed_config", {})


def launched(asked: str) -> Strategy:
    """The strategy that the started processes are to run: the one asked for, or for `auto` what their launcher announced."""
    if asked != "auto":
        return named(asked)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return named(f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}")
    return named("single" if world_size() == 1 else "ddp")


def refusal(name: str, world: int, *, method: str, optimizer: str = "adamw", is_projected: bool = False) -> str | None:
    """Why this cannot be trained, ending with what to try; None if it can. Both dtypes are legal everywhere."""
    if method == "qlora" and (fault := one_process_only({"NGPU": str(world), "STRATEGY": name})):
        return fault
    if optimizer == "paged_adamw" and (world > 1 or name != "single"):
        return "optim.name=paged_adamw is for one process, its states are not sharded; try optim.name=adamw"
    if is_projected and named(name).stage == 3:
        return f"adapter.projection: a projected prefix is not sharded by {name}; try STRATEGY=zero2, or without it"
    if name == "single" and world > 1:
        return f"STRATEGY=single is one process, not NGPU={world}; try STRATEGY=zero2"
    if name == "ddp" and world == 1:
        return "STRATEGY=ddp averages over several processes, this is one; try STRATEGY=single"
    return None


def matrix() -> Iterator[tuple[str, str, int, str, str | None]]:
    """Every (method, strategy, processes, dtype) with its refusal; `processes` is 1 or 2, which stands for several."""
    for method, name, world, dtype in itertools.product(METHODS, in_order(), (1, 2), DTYPES):
        optimizer = "paged_adamw" if method == "qlora" else "adamw"
        yield method, name, world, dtype, refusal(name, world, method=method, optimizer=optimizer)


def in_order() -> list[str]:
    """The shipped strategies, the one that shares least first."""
    return sorted(shipped("strategy"), key=lambda name: (name != "single", named(name).stage, named(name).is_offloaded))


def page() -> str:
    """docs/strategies.md."""
    rows = list(matrix())
    lines = [
        INTRODUCTION,
        "## What is legal\n",
        "Printed by `python -m launcher.strategies`, from the table that `make plan` and the tests use. `yes` holds for",
        "bf16 and fp32 alike.\n",
        f"| method | NGPU | {' | '.join(f'`{name}`' for name in in_order())} |",
        f"|---|---|{'---|' * len(in_order())}",
    ]
    reasons: dict[str, int] = {}
    for method, world in itertools.product(METHODS, (1, 2)):
        cells = []
        for name in in_order():
            (why,) = {row[4] for row in rows if row[:3] == (method, name, world)}
            rule = re.split(", not |;", why or "")[0]
            cells.append(f"no ({reasons.setdefault(rule, len(reasons) + 1)})" if rule else "yes")
        lines.append(f"| {method} | {world if world == 1 else 'more'} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {rule}" for rule, number in reasons.items())]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Strategies

A strategy is how several processes (one a GPU) share a training: a file of `configs/strategy/` that `accelerate launch
--config_file` reads too. `STRATEGY=auto` takes the fastest that fits into the memory that `make plan` finds, in the order
`single`, `zero2`, `zero3`, `zero3-offload`.

| strategy | what each process holds | take it when |
|---|---|---|
| `single` | everything, in one process | one GPU, or none |
| `ddp` | everything; gradients are averaged (torch DistributedDataParallel) | DeepSpeed is not wanted |
| `zero1` | the base; its share of the optimizer state | to compare |
| `zero2` | the base; its share of gradients and optimizer state | several GPUs, and the base fits into each |
| `zero3` | its share of everything, the frozen base too | the base does not fit into one GPU |
| `zero3-offload` | the same, the base in host memory | the base does not fit into all GPUs together; slow |

Under `zero3` the base is sharded while it is loaded: only the first process reads the weights, one tensor at a time. The
optimizer state of an adapter is small and always stays on the GPU, so no DeepSpeed kernel is compiled and no CUDA toolkit is
needed. A run may be resumed with another number of processes and another strategy: a checkpoint holds the trained state whole.

FSDP2 is not among them: it would shard what ZeRO-3 shards, and could be tested here in name only.
"""

if __name__ == "__main__":
    print(page(), end="")
