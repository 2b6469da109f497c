"""How a global batch becomes steps, micro-batches and accumulation; pure."""

from launcher.config import Config
from launcher.errors import UserError

LARGEST_AUTO_MICRO = 16


def micro_batch_sizes(config: Config, world: int) -> list[int]:
    """The micro-batches that divide the global batch, largest first; raises `UserError` where there is none."""
    largest, _ = split_batch(config, world)
    if config.batch.micro != "auto":
        return [largest]
    share = config.batch.size // world
    return [micro for micro in range(largest, 0, -1) if share % micro == 0]


def split_batch(config: Config, world: int, largest: int = LARGEST_AUTO_MICRO) -> tuple[int, int]:
    """(micro-batch, accumulation steps) with micro x accumulation x world = batch.size, or a `UserError`.

    `auto` is the largest divisor up to `largest`.
    """
    size = config.batch.size
    if size % world:
        raise UserError(
            f"batch.size={size} does not divide over {world} processes; try batch.size={_round(size, world)}"
        )
    if config.batch.micro == "auto":
        share = size // world
        micro = max(m for m in range(1, min(share, largest) + 1) if share % m == 0)
    else:
        micro = config.batch.micro
    if size % (world * micro):
        raise UserError(
            f"batch.size={size} is not a multiple of {world} processes x batch.micro={micro}; "
            f"try batch.size={_round(size, world * micro)}"
        )
    return micro, size // (world * micro)


def smaller_micro(micro: int, share: int) -> int | None:
    """At most half of a micro-batch, and a divisor of a process's share of the step; None below one."""
    return next((m for m in range(micro // 2, 0, -1) if share % m == 0), None)


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
