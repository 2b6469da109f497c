"""The options of serving, `serve.name=value` each. A default stands here and nowhere else."""

import dataclasses
from dataclasses import dataclass

from serve.errors import UserError, nearest

PREFIX = "serve."


@dataclass(frozen=True)
class Settings:
    """`memory` is the share of the free memory that weights, adapters and cache may take together.

    `slots` and `context` 0 mean as many as fit, up to what is sensible; `chunk` 0 lets the device decide.
    `queue` requests may wait, `share` of them from one client. `drain_s` is how long open requests may go on after a
    signal; an engine that says nothing for `hung_s` seconds while it has work is started again.
    """

    memory: float = 0.9
    slots: int = 0
    context: int = 0
    chunk: int = 0
    queue: int = 64
    share: int = 32
    drain_s: float = 20.0
    hung_s: float = 120.0

    def words(self) -> list[str]:
        """The words that make these settings, those that differ from the defaults."""
        return [
            f"{PREFIX}{f.name}={value}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default
        ]


# The least and the most of each.
BOUNDS: dict[str, tuple[float, float]] = {
    "memory": (0.05, 1.0),
    "slots": (0, 256),
    "context": (0, 2**20),
    "chunk": (0, 2**16),
    "queue": (1, 10_000),
    "share": (1, 10_000),
    "drain_s": (0, 3600),
    "hung_s": (1, 3600),
}


def parse(words: list[str]) -> Settings:
    """Read `serve.name=value` words; raises `UserError`."""
    kinds = {name: type(value) for name, value in dataclasses.asdict(Settings()).items()}
    values: dict[str, float] = {}
    for word in words:
        name, _, text = word.removeprefix(PREFIX).partition("=")
        if name not in kinds:
            raise UserError(f"{word}: unknown; {nearest(name, kinds)} Try {PREFIX}slots=8")
        low, high = BOUNDS[name]
        try:
            values[name] = kinds[name](text)
            is_valid = low <= values[name] <= high
        except ValueError:
            is_valid = False
        if not is_valid:
            kind = "whole number" if kinds[name] is int else "number"
            raise UserError(f"{word}: must be a {kind} from {low:g} to {high:g}; try {PREFIX}{name}={high:g}")
    return Settings(**values)  # type: ignore[arg-type]
