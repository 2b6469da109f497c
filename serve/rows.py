"""Which request sits in which row of the cache, and what every row remembers. Pure: the keys and values are moved by a `Mover`.

Rows whose requests are answering are always the first ones, so that a step reads one plain slice of the cache. A row that
was given back keeps its tokens until it is needed: the next turn of the conversation finds them and reads only what is new.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Mover(Protocol):
    """Moves keys and values between rows; lengths count positions from the head of a row."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first positions of `target` those of `source`."""
        ...

    def swap(self, one: int, other: int, lengths: tuple[int, int]) -> None:
        """Exchange two rows, of which so many positions are in use."""
        ...


@dataclass
class Row:
    """`tokens` are those whose keys and values are here, as the model `adapter` read them. Nobody's where `slot` is None."""

    adapter: str = ""
    tokens: list[int] = field(default_factory=list)
    slot: int | None = None
    used: int = 0


class Rows:
    """`head_of(adapter)` is how many positions an adapter's own prefix takes at the head of each row."""

    def __init__(self, number: int, mover: Mover, head_of: Callable[[str], int] = lambda adapter: 0) -> None:
        self.rows = [Row() for _ in range(number)]
        self.num_answering = 0
        self._mover = mover
        self._head_of = head_of
        self._row_of: dict[int, int] = {}
        self._clock = 0

    def row_of(self, slot: int) -> int:
        """The row of an occupied slot; it changes when others come and go."""
        return self._row_of[slot]

    @property
    def answering(self) -> list[int]:
        """The slots of the answering rows, in the order of the rows."""
        slots = [row.slot for row in self.rows[: self.num_answering]]
        return [slot for slot in slots if slot is not None]

    def start(self, slot: int, adapter: str, ids: Sequence[int]) -> int:
        """Give the slot a row; how many of the ids that row has already, always less than all."""
        donor, shared = self._best_donor(adapter, ids)
        # A free row that is mostly this very conversation goes on in place; another one is copied and stays.
        is_same = shared > 0 and self.rows[donor].slot is None and 2 * shared >= len(self.rows[donor].tokens)
        target = donor if is_same else self._oldest_free()
        if shared and target != donor:
            self._mover.copy(donor, target, self._head_of(adapter) + shared)
        self.rows[target] = Row(adapter, list(ids[:shared]), slot, self._tick())
        self._row_of[slot] = target
        return shared

    def answer(self, slot: int) -> None:
        """Its prompt has been read: the slot joins the answering rows."""
        self._swap(self._row_of[slot], self.num_answering)
        self.num_answering += 1

    def free(self, slot: int) -> None:
        """The slot is given back; its row keeps what it has."""
        row = self._row_of[slot]
        if row < self.num_answering:
            self.num_answering -= 1
            self._swap(row, self.num_answering)
        row = self._row_of.pop(slot)
        self.rows[row].slot = None
        self.rows[row].used = self._tick()

    def forget(self, adapter: str) -> None:
        """What this adapter has read is never used again."""
        for row in self.rows:
            if row.adapter == adapter:
                row.tokens, row.used = [], 0

    def _best_donor(self, adapter: str, ids: Sequence[int]) -> tuple[int, int]:
        """The row with the longest common beginning, and its length; the last id must be read in any case."""
        readable = ids[:-1]
        shared = [common_length(row.tokens, readable) if row.adapter == adapter else 0 for row in self.rows]
        # Of equal ones a free row: it can be taken in place.
        best = max(range(len(shared)), key=lambda i: (shared[i], self.rows[i].slot is None))
        return best, shared[best]

    def _oldest_free(self) -> int:
        return min((i for i, row in enumerate(self.rows) if row.slot is None), key=lambda i: self.rows[i].used)

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        rows = self.rows
        self._mover.swap(one, other, (self._length(one), self._length(other)))
        rows[one], rows[other] = rows[other], rows[one]
        for index in (one, other):
            if (slot := rows[index].slot) is not None:
                self._row_of[slot] = index

    def _length(self, row: int) -> int:
        return self._head_of(self.rows[row].adapter) + len(self.rows[row].tokens) if self.rows[row].tokens else 0

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many elements at the beginning are the same, by halving: comparing slices is quick, walking is not."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
