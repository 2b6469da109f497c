"""A decode step recorded once for each shape and replayed: on a GPU launching kernels one by one takes longer than they do.

Recorded are the forward pass and its logits; the inputs are copied into the same memory every time. (CUDA graphs; see
Nguyen et al., Accelerating PyTorch with CUDA Graphs, 2021.)
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

WARM_UPS = 3
MAX_GRAPHS = 64
# A recorded step reads at least so many positions: fewer are hardly quicker, and one shape more.
LEAST_LENGTH = 256

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Recording:
    """What replays a step, and the output that a replay leaves until the next one of any; `pool` is where its memory lies."""

    replay: Callable[[], Any]
    output: torch.Tensor
    pool: Any = None


class Recorder(Protocol):
    """Records one call of `step` on `inputs`, in the memory of an earlier recording if there is one."""

    def __call__(self, step: Step, inputs: torch.Tensor, pool: Any) -> Recording: ...  # noqa: D102


class Graphs:
    """Runs steps through recordings by key; where recording fails it says why in `state` and runs them as they are."""

    def __init__(self, record: Recorder | None) -> None:
        self.state = "off" if record is None else "on"
        self._record = record
        self._most = MAX_GRAPHS
        # The one that was used last is the last one.
        self._recorded: dict[Hashable, tuple[torch.Tensor, Recording]] = {}

    @property
    def is_on(self) -> bool:
        """Whether steps are recorded."""
        return self._record is not None

    def run(self, key: Hashable, step: Step, inputs: torch.Tensor) -> torch.Tensor:
        """`step(inputs)`; everything but the values of `inputs` must be decided by `key`. Holds until the next run."""
        if self._record is None:
            return step(inputs)
        try:
            known = self._recorded.pop(key) if key in self._recorded else None
            static, recording = known or self._new(self._record, step, inputs)
        except torch.OutOfMemoryError as fault:
            self._keep_fewer(fault)
            return step(inputs)
        except RuntimeError as fault:
            self._give_up(fault)
            return step(inputs)
        self._recorded[key] = static, recording
        static.copy_(inputs)
        recording.replay()
        return recording.output

    def forget(self) -> None:
        """What was recorded no longer holds: the adapters have changed."""
        self._recorded.clear()

    def _new(self, record: Recorder, step: Step, inputs: torch.Tensor) -> tuple[torch.Tensor, Recording]:
        if len(self._recorded) >= self._most:
            del self._recorded[next(iter(self._recorded))]
        # Recordings are replayed one after the other, so they share their memory; it is gone with the last of them.
        pool = next((recording.pool for _, recording in self._recorded.values()), None)
        static = inputs.clone()
        return static, record(step, static, pool)

    def _keep_fewer(self, fault: RuntimeError) -> None:
        """Half as many as did not fit; none at all where not even one does."""
        self._most = (len(self._recorded) + 1) // 2
        self.forget()
        if not self._most:
            self._give_up(fault)

    def _give_up(self, fault: RuntimeError) -> None:
        self._record = None
        self.forget()
        self.state = f"off: {str(fault).splitlines()[0]}"


def record_cuda(step: Step, inputs: torch.Tensor, pool: Any) -> Recording:
    """Capture a CUDA graph, after a few runs beside the main stream as torch demands."""
    side, main = _side_stream(inputs.device), torch.cuda.current_stream(inputs.device)
    side.wait_stream(main)
    graph = torch.cuda.CUDAGraph()
    # This gives the main stream back also where a capture fails; torch's own way out does not.
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step(inputs)
        with torch.cuda.graph(graph, pool=pool, stream=side):
            output = step(inputs)
    main.wait_stream(side)
    return Recording(graph.replay, output, graph.pool())


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: each stream has a workspace of its own in cuBLAS."""
    return torch.cuda.Stream(device)


def row_bucket(number: int, most: int) -> int:
    """The next power of two, at most `most`: how many rows a recorded step has."""
    return min(1 << (number - 1).bit_length(), most)


def length_bucket(length: int, most: int) -> int:
    """256, 384, 512, 768, 1024, 1536 and so on, at most `most`: how many positions a recorded step reads."""
    power = 1 << (length - 1).bit_length()
    middle = power * 3 // 4
    return min(max(middle if length <= middle else power, LEAST_LENGTH), most)
