"""Choose the next token of every row: greedy, or drawn with noise keyed by seed and position, so company changes nothing.

The filters are those of the field, in the order of transformers: repetition penalty (arXiv:1909.05858, section 4.1),
temperature, top-k, top-p (arXiv:1904.09751), min-p (arXiv:2407.01082). Drawing is the Gumbel-max trick: the argmax of
logits + Gumbel noise is a sample of their softmax.
"""

from collections.abc import Sequence

import torch

from serve.engine import Sampling

GREEDY = Sampling()
# Constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), as signed numbers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
# The nucleus is looked for among so many tokens first; sorting a whole vocabulary takes a processor milliseconds a row.
CANDIDATES = 1024


class Sampler:
    """Remembers how each slot samples, and which tokens it has seen where it is penalised for repeating them."""

    def __init__(self, num_slots: int, vocabulary: int, device: torch.device) -> None:
        self._sampling = [GREEDY] * num_slots
        self._seen: dict[int, torch.Tensor] = {}
        self._vocabulary = vocabulary
        self._device = device

    def start(self, slot: int, ids: Sequence[int], sampling: Sampling) -> None:
        """A request begins in this slot with this prompt."""
        self._sampling[slot] = sampling
        self._seen.pop(slot, None)
        if sampling.repetition_penalty != 1:
            self._seen[slot] = torch.zeros(self._vocabulary, dtype=torch.bool, device=self._device)
            self._seen[slot][torch.tensor(list(ids), device=self._device)] = True

    def free(self, slot: int) -> None:
        """The request is over."""
        self._seen.pop(slot, None)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The next tokens for fp32 `logits` [B, vocabulary] of these slots, whose next tokens take these positions.

        -1 where the logits are not numbers. One transfer from the device.
        """
        for row, slot in enumerate(slots):
            if slot in self._seen:
                penalty = self._sampling[slot].repetition_penalty
                logits[row] = penalise(logits[row], self._seen[slot], penalty)
        largest, tokens = logits.max(-1)
        drawn = [row for row, slot in enumerate(slots) if self._sampling[slot].temperature > 0]
        if drawn:
            chosen = [self._sampling[slots[row]] for row in drawn]
            index = torch.tensor(drawn, device=logits.device)
            tokens[index] = draw(logits[index], chosen, [positions[row] for row in drawn])
        tokens = torch.where(largest.isfinite(), tokens, -1)
        for row, slot in enumerate(slots):
            if slot in self._seen:
                # -1 is no token, but its request is over anyway.
                self._seen[slot][tokens[row]] = True
        return tokens.tolist()


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide the positive logits of seen tokens by the penalty, multiply the negative ones by it."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> torch.Tensor:
    """One token a row, int64 [B], from fp32 `logits` [B, vocabulary]."""
    kept = truncate(logits, samplings)
    return (kept + gumbel([s.seed or 0 for s in samplings], positions, logits)).argmax(-1)


def truncate(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """The logits over the temperature, -inf where top-k, top-p or min-p leave a token out; each row by its own rules."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    logits = logits / column([s.temperature for s in samplings])
    if any(s.top_k or s.top_p < 1 for s in samplings):
        floor = _floor(logits, samplings)
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if any(s.min_p for s in samplings):
        # p >= min_p * p_max is the same as logit >= logit_max + log(min_p).
        floor = logits.max(-1, keepdim=True).values + column([s.min_p for s in samplings]).log()
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits


def _floor(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """The smallest logit that top-k and then top-p keep, [B, 1]."""
    vocabulary = logits.shape[-1]
    if logits.device.type == "cpu" and all(s.top_k <= CANDIDATES < vocabulary for s in samplings):
        floor, is_told = _floor_among(logits, samplings, CANDIDATES)
        if bool(is_told.all()):
            return floor
    return _floor_among(logits, samplings, vocabulary)[0]


def _floor_among(logits: torch.Tensor, samplings: Sequence[Sampling], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`_floor` by the `number` largest logits, and for each row whether they were enough to tell."""
    vocabulary = logits.shape[-1]
    ranks = torch.arange(number, device=logits.device)
    top_k = torch.tensor([s.top_k or vocabulary for s in samplings], device=logits.device)[:, None]
    top_p = torch.tensor([s.top_p for s in samplings], device=logits.device)[:, None]
    ordered = logits.topk(number).values.masked_fill(ranks >= top_k, float("-inf"))
    # Where top-k keeps only some, the probabilities are those among the kept.
    is_limited = top_k < vocabulary
    total = torch.where(is_limited, ordered.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))
    probabilities = (ordered - total).exp()
    before = probabilities.cumsum(-1) - probabilities
    # The token that reaches top_p is kept too; the first one always.
    kept = ((before < top_p) & (ordered > float("-inf"))) | (ranks == 0)
    floor = ordered.masked_fill(~kept, float("inf")).amin(-1, keepdim=True)
    is_open = (top_p >= 1) & ~is_limited
    return floor.masked_fill(is_open, float("-inf")), is_open | ~kept[:, -1:] | (number == vocabulary)


def gumbel(seeds: Sequence[int], positions: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Gumbel noise fp32 [B, vocabulary] on the device of `like`: a pure function of seed, position and token."""
    keys = torch.tensor([_mixed(seed, position) for seed, position in zip(seeds, positions, strict=True)])
    tokens = torch.arange(like.shape[-1], device=like.device)
    bits = _splitmix(keys.to(like.device)[:, None] + tokens * _STEP)
    # 53 random bits to a number above 0 and below 1.
    uniform = ((bits >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
    return -torch.log(-torch.log(uniform)).float()


def _mixed(seed: int, position: int) -> int:
    return int(_splitmix(_splitmix(torch.tensor([seed])) + position))


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64, on int64 whose overflow wraps."""
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right: the sign is a bit like any other."""
    return (x >> by) & (2 ** (64 - by) - 1)
