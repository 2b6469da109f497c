"""How much of the prompts that wait a turn may read. Pure: tokens and seconds in, tokens out."""

from collections.abc import Sequence

# So many of the engine's chunks are read at once while nobody is answered: larger chunks are cheaper.
ALONE_CHUNKS = 2
# A chunk takes about so long at most, in seconds: while somebody waits for a next word, and while nobody does. Whatever comes
# meanwhile, a cancel or an adapter to load, waits for its end.
SECONDS, ALONE_SECONDS = 0.25, 0.5
# Chunks are multiples of this many tokens: fewer at once cost as much.
UNIT = 32
# The first one of all shows how quick this machine is.
FIRST = 64


class Pace:
    """The size of chunks: what the engine was told, or less where this machine would take too long for it."""

    def __init__(self, usual: int) -> None:
        self._usual = usual
        # Tokens a second, as far as is known.
        self._rate: float | None = None
        self._last = 0

    def chunk(self, num_answering: int) -> int:
        """How many tokens the next turn may read, while so many are answered."""
        most, seconds = (self._usual, SECONDS) if num_answering else (ALONE_CHUNKS * self._usual, ALONE_SECONDS)
        affordable = FIRST if self._rate is None else max(int(self._rate * seconds) // UNIT * UNIT, UNIT)
        self._last = min(most, affordable)
        return self._last

    def took(self, tokens: int, seconds: float) -> None:
        """So many tokens were read in that time. Much less than a chunk tells nothing: it takes nearly as long as all of it."""
        if 2 * tokens >= self._last:
            self._rate = tokens / max(seconds, 1e-6)


def num_read_together(remaining: Sequence[int], chunk: int) -> int:
    """How many prompts are read in one pass: the first ones, as long as all, padded to the longest, fit the chunk."""
    number = 1
    while number < len(remaining) and (number + 1) * max(remaining[: number + 1]) <= chunk:
        number += 1
    return number
