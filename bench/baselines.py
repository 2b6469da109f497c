"""Other ways to answer the same questions with the same model: transformers' `generate` and continuous batching, llama.cpp."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Blocks of 256 tokens that continuous batching may use for its cache; without a number it takes most of the memory.
CPU_BLOCKS = 128


@dataclass
class Result:
    """Some questions answered at once. `stamps` are the moments of the tokens of each answer, from the common start."""

    seconds: float = 0.0
    stamps: list[list[float]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.stamps))

    @property
    def rate(self) -> float:
        """Tokens a second, the prompts' reading included."""
        return self.tokens / self.seconds

    @property
    def firsts(self) -> list[float]:
        """Seconds to the first token of each answer."""
        return [stamps[0] for stamps in self.stamps if stamps]

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return [b - a for stamps in self.stamps for a, b in itertools.pairwise(stamps)]


Prompts = Sequence[Sequence[int]]
Baseline = Callable[[Prompts, int], Result]


def generate(model: Any, stop_ids: Sequence[int]) -> Baseline:
    """One padded batch; nobody can join or leave it."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        """Looks at the clock with every token."""

        def __init__(self) -> None:
            self.moments: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.moments.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def run(prompts: Prompts, num_tokens: int) -> Result:
        longest, clock = max(map(len, prompts)), Clock()
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        begun = time.perf_counter()
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, use_cache=True,
            eos_token_id=list(stop_ids) or None, stopping_criteria=StoppingCriteriaList([clock]), temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        answers = out[:, longest:].tolist()
        ends = [next((i for i, token in enumerate(answer) if token in stop_ids), len(answer)) for answer in answers]
        moments = [moment - begun for moment in clock.moments]
        return Result(time.perf_counter() - begun, [moments[:end] for end in ends])

    return run


def continuous(model: Any, stop_ids: Sequence[int]) -> Baseline:
    """transformers' continuous batching, its manager warm, tokens streamed."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    def run(prompts: Prompts, num_tokens: int) -> Result:
        own = model.config._attn_implementation
        blocks = {"num_blocks": CPU_BLOCKS, "max_batch_tokens": 512} if model.device.type == "cpu" else {}
        eos = {"eos_token_id": list(stop_ids)} if stop_ids else {"eos_token_id": -1}
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, max_new_tokens=num_tokens, pad_token_id=0, **eos),
            ContinuousBatchingConfig(**blocks),
        )
        manager.start()
        try:
            # What it builds at its first request is not counted.
            _stream(manager, [prompts[0][:8]], 2)
            result = _stream(manager, prompts, num_tokens)
        finally:
            manager.stop(block=True)
            # It leaves the model with another attention than it found.
            model.set_attn_implementation(own)
        for stamps, ids in zip(result.stamps, manager.answers, strict=True):
            del stamps[len(ids) - (bool(ids) and ids[-1] in stop_ids) :]
        return result

    return run


def _stream(manager: Any, prompts: Prompts, num_tokens: int) -> Result:
    begun = time.perf_counter()
    names = [manager.add_request(list(p), max_new_tokens=num_tokens, streaming=True) for p in prompts]
    result, manager.answers = Result(stamps=[[] for _ in names]), [[] for _ in names]
    left = set(names)
    while left:
        output = manager.get_result(timeout=1.0)
        if output is None:
            assert manager.is_running(), "continuous batching has stopped"
            continue
        assert output.error is None, output.error
        number = names.index(output.request_id)
        new = len(output.generated_tokens) - len(result.stamps[number])
        result.stamps[number] += [time.perf_counter() - begun] * new
        manager.answers[number] = list(output.generated_tokens)
        left -= {output.request_id} if output.is_finished() else set()
    result.seconds = time.perf_counter() - begun
    return result


def llama_cpp(path: str) -> Baseline:
    """llama.cpp through its Python package, one question after another; `path` is a GGUF file of the same model."""
    from llama_cpp import Llama

    model = Llama(path, n_ctx=4096, verbose=False)

    def run(prompts: Prompts, num_tokens: int) -> Result:
        begun, result = time.perf_counter(), Result()
        for prompt in prompts:
            stamps: list[float] = []
            for _ in model.create_completion(list(prompt), max_tokens=num_tokens, temperature=0.0, stream=True):
                stamps.append(time.perf_counter() - begun)
            result.stamps.append(stamps)
        result.seconds = time.perf_counter() - begun
        return result

    return run


def copy_bandwidth(device: torch.device, size: int = 2**28, rounds: int = 9) -> float:
    """Bytes a second, read and written, of copying a tensor of `size` bytes: the best of some rounds."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = 0.0
    for _ in range(rounds):
        wait_for(device)
        begun = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        best = max(best, 2 * size / (time.perf_counter() - begun))
    return best


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a token of one stream reads: all but an embedding that is not also the head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return total if embedding is head else total - embedding.numel() * embedding.element_size()
