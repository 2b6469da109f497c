"""What the launcher announced to this process, in the words of torchrun. Free of torch."""

import os


def world_size() -> int:
    """How many processes were started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this one among them."""
    return int(os.environ.get("RANK", "0"))


def is_launched() -> bool:
    """Whether a launcher started this process, be it the only one."""
    return "RANK" in os.environ
