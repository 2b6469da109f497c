"""Weigh the strategies for a training and pick one: the fastest that is legal and fits into memory; pure."""

from dataclasses import dataclass

from launcher.architecture import Architecture
from launcher.arithmetic import micro_batch_sizes, resolve_dtype
from launcher.config import Config
from launcher.errors import UserError
from launcher.hardware import GIB, Hardware
from launcher.memory import Memory, estimate
from launcher.strategies import FASTEST_FIRST, Strategy, named, refusal

# What an allocator loses to gaps; the rest of the memory is planned with.
USABLE = 0.92


@dataclass(frozen=True)
class Demand:
    """What is trained, as far as it decides memory. `architecture` None: the model's sizes are not known here.

    `longest` bounds the tokens of one example.
    """

    architecture: Architecture | None = None
    longest: int = 1024


@dataclass(frozen=True)
class Choice:
    """One strategy, weighed: `refusal` says why it cannot be; else it takes `memory` at `micro` examples at a time."""

    strategy: Strategy
    refusal: str | None = None
    micro: int = 1
    memory: Memory | None = None
    fits: bool = True

    @property
    def need(self) -> str:
        """The memory of a process, in words."""
        if self.memory is None:
            return "memory not known"
        host = f" and {self.memory.host / GIB:.1f} GiB of host memory" if self.memory.host else ""
        return f"{self.memory.total / GIB:.1f} GiB{host}"


def weigh(config: Config, world: int, ngpu: int, hardware: Hardware, demand: Demand) -> list[Choice]:
    """Every strategy that was asked for, in the order of preference, with what it takes at the best micro-batch."""
    asked = config.parallel.strategy
    found = []
    for name in FASTEST_FIRST if asked == "auto" else (asked,):
        is_pointless = not hardware.num_gpus if named(name).is_offloaded else world == 1 and named(name).stage > 0
        if asked == "auto" and is_pointless:
            continue  # without a GPU there is nothing to offload from, in one process nothing to shard
        why = refuse(config, name, world)
        found.append(Choice(named(name), why) if why else _best(config, named(name), world, ngpu, hardware, demand))
    return found


def refuse(config: Config, name: str, world: int) -> str | None:
    """Why this configuration cannot be trained with that strategy, None if it can."""
    return refusal(
        name, world, method=config.adapter.method, optimizer=config.optim.name, is_projected=config.adapter.projection
    )


def _best(config: Config, strategy: Strategy, world: int, ngpu: int, hardware: Hardware, demand: Demand) -> Choice:
    """The largest micro-batch that fits, else the smallest there is."""
    micros = micro_batch_sizes(config, world)
    if demand.architecture is None:
        return Choice(strategy, micro=micros[0])
    for micro in micros:
        memory = _memory(config, strategy, world, hardware, demand, micro)
        if _fits(memory, ngpu, hardware):
            return Choice(strategy, micro=micro, memory=memory)
    return Choice(strategy, micro=micros[-1], memory=memory, fits=False)


def _memory(config: Config, strategy: Strategy, world: int, hardware: Hardware, demand: Demand, micro: int) -> Memory:
    assert demand.architecture is not None
    return estimate(
        config, demand.architecture, stage=strategy.stage, is_offloaded=strategy.is_offloaded,
        is_sharded_engine=strategy.stage > 0, world=world, micro=micro, length=demand.longest,
        dtype=resolve_dtype(config, hardware.has_bf16), on_gpu=hardware.num_gpus > 0,
    )  # fmt: skip


def _fits(memory: Memory, ngpu: int, hardware: Hardware) -> bool:
    """Whether each process finds its memory, and all of a machine together theirs."""
    on_device, on_host = memory.total, ngpu * memory.host
    if not hardware.num_gpus:
        on_device, on_host = 0, ngpu * (memory.total + memory.host)
    return not (
        (hardware.gpu_bytes and on_device > USABLE * hardware.gpu_bytes)
        or (hardware.host_bytes and on_host > USABLE * hardware.host_bytes)
    )


def pick(config: Config, choices: list[Choice], hardware: Hardware) -> Choice:
    """The first that is legal and fits; a strategy asked for by name is taken at its word. Raises `UserError`."""
    legal = [choice for choice in choices if choice.refusal is None]
    if not legal:
        # What stands in the way of the first is what the user can change.
        raise UserError(str(choices[0].refusal))
    fitting = [choice for choice in legal if choice.fits]
    if fitting or config.parallel.strategy != "auto":
        return (fitting or legal)[0]
    needs = ", ".join(f"{choice.strategy.name} {choice.need}" for choice in legal)
    raise UserError(
        f"{config.model.name} does not fit into {_available(hardware)}; a process needs at least: {needs}; {_smaller(config)}"
    )


def _available(hardware: Hardware) -> str:
    if hardware.num_gpus:
        return f"{hardware.num_gpus} x {(hardware.gpu_bytes or 0) / GIB:.1f} GiB"
    return f"{(hardware.host_bytes or 0) / GIB:.1f} GiB in all"


def _smaller(config: Config) -> str:
    """What to try where memory does not suffice, the cheapest first."""
    ways = []
    if not config.model.gradient_checkpointing and config.adapter.method != "prefix":
        ways.append("model.gradient_checkpointing=true")
    if config.adapter.method == "lora":
        ways.append("PEFT=qlora")
    return f"try {', '.join([*ways, 'a smaller data.max_length, more GPUs (NGPU=)'])}, or a smaller MODEL"


def doubts(chosen: Choice, hardware: Hardware, demand: Demand) -> list[str]:
    """What makes the memory of the plan uncertain."""
    if demand.architecture is None:
        return ["the model's sizes are not known here, so its memory was not planned"]
    doubts = []
    if not demand.architecture.is_known:
        doubts.append(f"{demand.architecture.family}: memory is estimated as if it were a Llama of its sizes")
    if not chosen.fits:
        doubts.append(
            f"this needs more memory than there is ({_available(hardware)}); STRATEGY=auto looks for another way"
        )
    if chosen.memory and chosen.memory.host and hardware.host_bytes is None:
        doubts.append(f"{chosen.memory.host / GIB:.1f} GiB of host memory a process are needed as well")
    return doubts
