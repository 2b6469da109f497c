"""A decode step recorded once for each shape and replayed: on a GPU launching kernels one by one takes longer than they do.

Recorded are the forward pass and its logits; the inputs are copied into the same memory every time. (CUDA graphs; see
Nguyen et al., Accelerating PyTorch with CUDA Graphs, 2021.)
"""

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

WARM_UPS = 3
MAX_GRAPHS = 64

Step = Callable[[torch.Tensor], torch.Tensor]


class Recorder(Protocol):
    """Records one call of `step` on `inputs` and gives what replays it and the output it leaves."""

    def __call__(self, step: Step, inputs: torch.Tensor) -> tuple[Callable[[], Any], torch.Tensor]: ...  # noqa: D102


class Graphs:
    """Runs steps through recordings by key; where recording fails it says why in `state` and runs them as they are."""

    def __init__(self, record: Recorder | None) -> None:
        self.state = "off" if record is None else "on"
        self._record = record
        self._recorded: dict[Hashable, tuple[torch.Tensor, Callable[[], Any], torch.Tensor]] = {}

    @property
    def is_on(self) -> bool:
        """Whether steps are recorded."""
        return self._record is not None

    def run(self, key: Hashable, step: Step, inputs: torch.Tensor) -> torch.Tensor:
        """`step(inputs)`; everything but the values of `inputs` must be decided by `key`."""
        if self._record is None:
            return step(inputs)
        if key not in self._recorded:
            try:
                self._recorded[key] = self._new(step, inputs)
            except RuntimeError as fault:
                self._record = None
                self.forget()
                self.state = f"off: {str(fault).splitlines()[0]}"
                return step(inputs)
        static, replay, output = self._recorded[key]
        static.copy_(inputs)
        replay()
        return output

    def forget(self) -> None:
        """What was recorded no longer holds: the adapters have changed."""
        self._recorded.clear()

    def _new(self, step: Step, inputs: torch.Tensor) -> tuple[torch.Tensor, Callable[[], Any], torch.Tensor]:
        if len(self._recorded) >= MAX_GRAPHS:
            del self._recorded[next(iter(self._recorded))]
        static = inputs.clone()
        assert self._record is not None
        return static, *self._record(step, static)


def record_cuda(step: Step, inputs: torch.Tensor) -> tuple[Callable[[], Any], torch.Tensor]:
    """Capture a CUDA graph, after a few runs beside the main stream as torch demands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(inputs)
    return graph.replay, output


def bucket(number: int, most: int) -> int:
    """The next power of two, at most `most`: how many rows a recorded step has."""
    return min(1 << (number - 1).bit_length(), most)
