"""Pure planning: (configuration, processes, hardware, model) -> what will be executed. `make plan` prints it.

Nothing here asks the machine anything, so a plan for 64 GPUs is made, and tested, on a laptop.
"""

import sys
from dataclasses import dataclass, replace

from launcher.architecture import Architecture
from launcher.arithmetic import resolve_dtype, smaller_micro, split_batch
from launcher.choices import Choice, Demand, doubts, pick, weigh
from launcher.config import Adapter, Config
from launcher.errors import UserError
from launcher.hardware import Hardware
from launcher.memory import Memory
from launcher.strategies import Strategy

# The environment variable that tells the training program what the user typed.
COMMAND = "AFINAR_COMMAND"


@dataclass(frozen=True)
class Nodes:
    """The machines of a training and where they meet; one machine needs no address and takes a free port."""

    count: int = 1
    rank: int = 0
    address: str | None = None
    port: int = 0


@dataclass(frozen=True)
class Plan:
    """One training, decided: `argv` in `env` starts it; a step is `micro` x `accumulation` x `world` examples.

    `ranks` are the processes of this machine; `choices` everything that was weighed, the chosen one among them. `longest`
    bounds the tokens of an example. `notes` say how this differs from what was asked, `doubts` what is not certain.
    """

    strategy: str
    world: int
    ranks: range
    micro: int
    accumulation: int
    dtype: str
    argv: tuple[str, ...]
    env: dict[str, str]
    notes: tuple[str, ...]
    doubts: tuple[str, ...] = ()
    longest: int = 0
    memory: Memory | None = None
    choices: tuple[Choice, ...] = ()

    @property
    def train_args(self) -> list[str]:
        """What `launcher.train` is given."""
        return list(self.argv[self.argv.index("launcher.train") + 1 :])

    @property
    def is_supervised(self) -> bool:
        """Whether accelerate's launcher starts it; else it is one plain process."""
        return self.strategy != "single"


def plan(
    config: Config,
    ngpu: int,
    hardware: Hardware,
    train_args: list[str],
    demand: Demand | None = None,
    nodes: Nodes | None = None,
) -> Plan:
    """Decide everything for `ngpu` processes on each machine; `train_args` are handed on to `launcher.train`.

    Raises `UserError` for what cannot work, and where `auto` finds nothing that fits.
    """
    demand, nodes = demand or Demand(), nodes or Nodes()
    if hardware.num_gpus and ngpu > hardware.num_gpus:
        has = f"{hardware.num_gpus} GPU{'s' * (hardware.num_gpus > 1)}"
        raise UserError(f"NGPU={ngpu}: this box has {has}; try NGPU={hardware.num_gpus}")
    require_room(config.adapter, demand.architecture)
    world = ngpu * nodes.count
    choices = weigh(config, world, ngpu, hardware, demand)
    chosen = pick(config, choices, hardware)
    micro, accumulation = split_batch(config, world, chosen.micro)
    decided = (f"parallel.strategy={chosen.strategy.name}", f"batch.micro={micro}")
    return Plan(
        strategy=chosen.strategy.name,
        world=world,
        ranks=range(nodes.rank * ngpu, (nodes.rank + 1) * ngpu),
        micro=micro,
        accumulation=accumulation,
        dtype=resolve_dtype(config, hardware.has_bf16),
        argv=(*_launcher(chosen.strategy, world, nodes), "-m", "launcher.train", *train_args, *decided),
        env=_environment(ngpu, hardware),
        notes=notes(config, on_gpu=hardware.num_gpus > 0),
        doubts=tuple(doubts(chosen, hardware, demand)),
        longest=demand.longest,
        memory=chosen.memory,
        choices=tuple(choices),
    )


def require_room(adapter: Adapter, model: Architecture | None) -> None:
    """Raise `UserError` for a prefix that is too long for this model."""
    if adapter.method == "prefix" and model and adapter.num_tokens > model.longest_prefix:
        most = model.longest_prefix
        raise UserError(
            f"adapter.num_tokens={adapter.num_tokens}: this model has room for a prefix of {most} tokens; "
            f"try adapter.num_tokens={min(Adapter().num_tokens, most)}"
        )


def halve(decided: Plan) -> Plan | None:
    """The same with the next smaller micro-batch, and the same examples a step; None where it is one already."""
    share = decided.micro * decided.accumulation
    micro = smaller_micro(decided.micro, share)
    if micro is None:
        return None
    return replace(decided, micro=micro, accumulation=share // micro, argv=(*decided.argv, f"batch.micro={micro}"))


def notes(config: Config, on_gpu: bool) -> tuple[str, ...]:
    """What the user should know about how this will differ from what was asked."""
    if config.optim.name == "paged_adamw" and not on_gpu:
        return ("paged AdamW: paging exists on GPUs only; here its states stay in ordinary memory",)
    return ()


def _launcher(strategy: Strategy, world: int, nodes: Nodes) -> tuple[str, ...]:
    if strategy.name == "single":
        return (sys.executable,)
    # --config_file always: without it accelerate reads whatever default_config.yaml lies in the user's cache.
    launch = ("-m", "accelerate.commands.launch", "--config_file", strategy.file, "--num_processes", str(world))
    machines = ("--num_machines", str(nodes.count), "--machine_rank", str(nodes.rank))
    meet: tuple[str, ...] = ("--main_process_port", str(nodes.port))
    if nodes.count > 1:
        assert nodes.address
        # The launcher that runs on every machine; DeepSpeed's own would log in to the others.
        meet = ("--main_process_ip", nodes.address, *meet)
        meet += ("--deepspeed_multinode_launcher", "standard") if strategy.stage else ()
    return (sys.executable, *launch, *machines, *meet)


def _environment(ngpu: int, hardware: Hardware) -> dict[str, str]:
    env = {"OMP_NUM_THREADS": str(max(1, hardware.num_cores // ngpu)), "TOKENIZERS_PARALLELISM": "false"}
    if not hardware.num_gpus:
        # Threads spin only briefly while they wait: 3 % slower alone, but a shared processor does not come to a crawl.
        env |= {"DS_ACCELERATOR": "cpu", "GOMP_SPINCOUNT": "10000"}
    return env
