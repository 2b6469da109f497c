"""How much work a run is, in tokens, and how long what is left of it takes. Pure."""

from collections import deque
from dataclasses import dataclass

# Steps that the speed is taken from.
NUM_NEWEST = 20


@dataclass(frozen=True)
class Effort:
    """The work of a run. A step learns from `learned` tokens on average.

    An evaluation reads `read` held-out tokens, and takes at most `answered` for some questions and their answers. There is
    one before the first step, one every `every` steps and one at the end, which reads `end` tokens more.
    """

    num_steps: int
    learned: float
    every: int
    read: int
    answered: int
    end: int

    @property
    def learning(self) -> int:
        """Tokens that are learned from."""
        return round(self.num_steps * self.learned)

    @property
    def num_evaluations(self) -> int:
        """All of them."""
        return 1 + self.evaluations_after(0)

    @property
    def measuring(self) -> int:
        """Tokens that are read and written to measure, at most."""
        return self.num_evaluations * (self.read + self.answered) + self.end

    def evaluations_after(self, step: int) -> int:
        """The evaluations to come when `step` steps are done, that of this step too if it is due."""
        return (self.num_steps - 1) // self.every - (max(step, 1) - 1) // self.every + 1


class Pace:
    """What was measured of an attempt so far, and what it says of the rest. `load_s`: loading the model, which is done again at the end."""

    def __init__(self, effort: Effort, load_s: float) -> None:
        self.effort = effort
        self._load_s = load_s
        self._num_steps = 0
        self._learn_s: deque[float] = deque(maxlen=NUM_NEWEST)
        self._evaluation_s = self._read_s = 0.0

    def add_step(self, seconds: float, tokens: int) -> None:
        """A step was made."""
        self._num_steps += 1
        if self._num_steps == 2:
            # The first one warms up.
            self._learn_s.clear()
        self._learn_s.append(seconds / max(1, tokens))

    def add_evaluation(self, seconds: float, read_s: float) -> None:
        """An evaluation took `seconds`, and `read_s` of them to read held-out tokens."""
        self._evaluation_s = seconds
        self._read_s = read_s / max(1, self.effort.read)

    @property
    def is_first_known(self) -> bool:
        """Whether a speed has just been measured for the first time."""
        return self._num_steps == min(2, self.effort.num_steps)

    def left(self, step: int) -> float:
        """Seconds until the run is finished, from where `step` steps are done: learning, evaluations, and the end."""
        effort = self.effort
        learn_s = sum(self._learn_s) / max(1, len(self._learn_s))
        learning = (effort.num_steps - step) * effort.learned * learn_s
        return learning + effort.evaluations_after(step) * self._evaluation_s + effort.end * self._read_s + self._load_s


def duration(seconds: float) -> str:
    """`95 s`, `12 min`, `3.5 h`."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
