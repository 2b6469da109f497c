"""Pure planning: (configuration, number of processes, hardware) -> what will be executed. `make plan` prints it."""

import sys
from dataclasses import dataclass

from launcher.config import Config
from launcher.errors import UserError
from launcher.hardware import Hardware
from launcher.variables import CONFIGS, one_process_only

LARGEST_AUTO_MICRO = 16


@dataclass(frozen=True)
class Plan:
    """One training, decided: `argv` in `env` starts it; a step is `micro` x `accumulation` x `world` examples."""

    strategy: str
    world: int
    micro: int
    accumulation: int
    dtype: str
    argv: tuple[str, ...]
    env: dict[str, str]
    notes: tuple[str, ...]


def plan(config: Config, ngpu: int, hardware: Hardware, train_args: list[str]) -> Plan:
    """Decide everything; `train_args` are handed on to `launcher.train`. Raises `UserError` for what cannot work."""
    if hardware.num_gpus and ngpu > hardware.num_gpus:
        has = f"{hardware.num_gpus} GPU{'s' * (hardware.num_gpus > 1)}"
        raise UserError(f"NGPU={ngpu}: this box has {has}; try NGPU={hardware.num_gpus}")
    strategy = choose_strategy(config, ngpu)
    micro, accumulation = split_batch(config, ngpu)
    return Plan(
        strategy=strategy,
        world=ngpu,
        micro=micro,
        accumulation=accumulation,
        dtype=resolve_dtype(config, hardware.has_bf16),
        argv=(*_launcher(strategy, ngpu), "-m", "launcher.train", *train_args),
        env=_environment(ngpu, hardware),
        notes=notes(config, on_gpu=hardware.num_gpus > 0),
    )


def choose_strategy(config: Config, ngpu: int) -> str:
    """The strategy that `auto` means for so many processes; raises `UserError` for a combination that cannot train."""
    asked = config.parallel.strategy
    if config.adapter.method == "qlora" and (fault := one_process_only({"NGPU": str(ngpu), "STRATEGY": asked})):
        raise UserError(fault)
    if config.optim.name == "paged_adamw" and (ngpu > 1 or asked not in ("auto", "single")):
        raise UserError("optim.name=paged_adamw is for one process, its states are not sharded; try optim.name=adamw")
    if asked == "auto":
        return "single" if ngpu == 1 else "zero2"
    if asked == "single" and ngpu > 1:
        raise UserError(f"STRATEGY=single is one process, not NGPU={ngpu}; try STRATEGY=zero2")
    return asked


def split_batch(config: Config, world: int) -> tuple[int, int]:
    """(micro-batch, accumulation steps) with micro x accumulation x world = batch.size, or a `UserError`."""
    size = config.batch.size
    if size % world:
        raise UserError(
            f"batch.size={size} does not divide over {world} processes; try batch.size={_round(size, world)}"
        )
    if config.batch.micro == "auto":
        share = size // world
        micro = max(m for m in range(1, min(share, LARGEST_AUTO_MICRO) + 1) if share % m == 0)
    else:
        micro = config.batch.micro
    if size % (world * micro):
        raise UserError(
            f"batch.size={size} is not a multiple of {world} processes x batch.micro={micro}; "
            f"try batch.size={_round(size, world * micro)}"
        )
    return micro, size // (world * micro)


def _round(size: int, multiple: int) -> int:
    """The largest multiple up to `size`, at least one."""
    return max(1, size // multiple) * multiple


def resolve_dtype(config: Config, has_bf16: bool) -> str:
    """`bf16` or `fp32`, the dtype of the forward pass."""
    if config.model.dtype == "auto":
        return "bf16" if has_bf16 else "fp32"
    return config.model.dtype


def num_steps(config: Config, num_examples: int) -> int:
    """Optimizer steps of the whole run; the last one is filled up from the next epoch's order."""
    steps = max(1, -(-round(num_examples * config.optim.epochs) // config.batch.size))
    return min(steps, config.optim.max_steps or steps)


def notes(config: Config, on_gpu: bool) -> tuple[str, ...]:
    """What the user should know about how this will differ from what was asked."""
    if config.optim.name == "paged_adamw" and not on_gpu:
        return ("paged AdamW: paging exists on GPUs only; here its states stay in ordinary memory",)
    return ()


def _launcher(strategy: str, world: int) -> tuple[str, ...]:
    if strategy == "single":
        return (sys.executable,)
    file = str(CONFIGS / "strategy" / f"{strategy}.yaml")
    # --config_file always: without it accelerate reads whatever default_config.yaml lies in the user's cache.
    launch = ("-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(world))
    return (sys.executable, *launch, "--main_process_port", "0")


def _environment(world: int, hardware: Hardware) -> dict[str, str]:
    env = {"OMP_NUM_THREADS": str(max(1, hardware.num_cores // world)), "TOKENIZERS_PARALLELISM": "false"}
    if not hardware.num_gpus:
        # Threads spin only briefly while they wait: 3 % slower alone, but a shared processor does not come to a crawl.
        env |= {"DS_ACCELERATOR": "cpu", "GOMP_SPINCOUNT": "10000"}
    return env
