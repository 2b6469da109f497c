"""Choose the next token of every row: greedy, or drawn with noise keyed by seed and position, so company changes nothing.

The filters are those of the field, in the order of transformers: repetition penalty (arXiv:1909.05858, section 4.1),
temperature, top-k, top-p (arXiv:1904.09751), min-p (arXiv:2407.01082). Drawing is the Gumbel-max trick: the argmax of
logits + Gumbel noise is a sample of their softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serve.engine import Sampling

GREEDY = Sampling()
# What is colder is greedy: logits over next to nothing are no numbers any more.
LEAST_TEMPERATURE = 1e-5
# What top-k 0 means: more than any vocabulary has.
NO_LIMIT = 2**31
# Constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), as signed numbers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
# The nucleus is looked for among so many tokens first; sorting a whole vocabulary takes a processor milliseconds a row.
CANDIDATES = 1024


class Rules:
    """How some rows of a batch are sampled: `samplings` as asked for, the rest as columns on the device of the logits."""

    def __init__(self, samplings: Sequence[Sampling], packed: torch.Tensor) -> None:
        self.samplings = samplings
        numbers = packed[:4].view(torch.float64).float()
        self.temperature, self.top_p, self.min_p, self.penalty = numbers[:, :, None]
        self.top_k = packed[4, :, None]
        self.seeds, self.positions, self.rows, self.slots = packed[5:]


def pack(samplings: Sequence[Sampling], places: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """What `Rules` reads, int64 [fields, B], so that it is one transfer; `places` are (position, row, slot)."""
    numbers = [(s.temperature, s.top_p, s.min_p, s.repetition_penalty) for s in samplings]
    whole = [(s.top_k or NO_LIMIT, s.seed or 0, *place) for s, place in zip(samplings, places, strict=True)]
    bits = torch.tensor(numbers, dtype=torch.float64).view(torch.int64)
    return torch.cat([bits, torch.tensor(whole)], 1).t().contiguous()


@dataclass(frozen=True)
class Plan:
    """What is done to a batch before the most likely token is taken; None: to no row."""

    penalised: Rules | None
    drawn: Rules | None


class Sampler:
    """Remembers how each slot samples, and which tokens it has seen where it is penalised for repeating them."""

    def __init__(self, num_slots: int, vocabulary: int, device: torch.device) -> None:
        self._sampling = [GREEDY] * num_slots
        self._seen = torch.zeros(num_slots, vocabulary, dtype=torch.bool, device=device)
        self._device = device

    def start(self, slot: int, ids: Sequence[int], sampling: Sampling) -> None:
        """A request begins in this slot with this prompt."""
        self._sampling[slot] = sampling
        if sampling.repetition_penalty != 1:
            self._seen[slot] = False
            self._seen[slot, torch.tensor(list(ids), device=self._device)] = True

    def free(self, slot: int) -> None:
        """The request is over."""
        self._sampling[slot] = GREEDY

    def plan(self, slots: Sequence[int], positions: Sequence[int]) -> Plan:
        """For `choose`: the rows of these slots, whose next tokens take these positions. One transfer, none if all are greedy.

        To be made before the forward pass is launched: a transfer may wait for all that was launched before it.
        """
        samplings = [self._sampling[slot] for slot in slots]
        penalised = [row for row, s in enumerate(samplings) if s.repetition_penalty != 1]
        drawn = [row for row, s in enumerate(samplings) if s.temperature >= LEAST_TEMPERATURE]
        rows, number = penalised + drawn, len(penalised)
        if not rows:
            return Plan(None, None)
        asked = [samplings[row] for row in rows]
        packed = pack(asked, [(positions[row], row, slots[row]) for row in rows]).to(self._device)
        return Plan(
            Rules(asked[:number], packed[:, :number]) if penalised else None,
            Rules(asked[number:], packed[:, number:]) if drawn else None,
        )

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, plan: Plan) -> list[int]:
        """The next tokens for fp32 `logits` [B, vocabulary], which are changed; -1 where they are not numbers.

        The host waits for the device once, at the end.
        """
        penalised, drawn = plan.penalised, plan.drawn
        if penalised is not None:
            rows = penalised.rows
            logits[rows] = penalise(logits[rows], self._seen[penalised.slots], penalised.penalty)
        largest, tokens = logits.max(-1)
        if drawn is not None:
            tokens[drawn.rows] = draw(logits[drawn.rows], drawn)
        tokens.masked_fill_(~largest.isfinite(), -1)
        if penalised is not None:
            # -1 marks some other token, but its request is over anyway.
            self._seen[penalised.slots, tokens[penalised.rows]] = True
        return tokens.tolist()


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Divide the positive logits of seen tokens by the penalty [B, 1], multiply the negative ones by it."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: torch.Tensor, rules: Rules) -> torch.Tensor:
    """One token a row, int64 [B], from fp32 `logits` [B, vocabulary]."""
    return (truncate(logits, rules) + gumbel(rules.seeds, rules.positions, logits.shape[-1])).argmax(-1)


def truncate(logits: torch.Tensor, rules: Rules) -> torch.Tensor:
    """The logits over the temperature, -inf where top-k, top-p or min-p leave a token out; each row by its own rules."""
    logits = logits / rules.temperature
    if any(s.top_k or s.top_p < 1 for s in rules.samplings):
        logits = logits.masked_fill(logits < _floor(logits, rules), float("-inf"))
    if any(s.min_p for s in rules.samplings):
        # p >= min_p * p_max is the same as logit >= logit_max + log(min_p).
        floor = logits.max(-1, keepdim=True).values + rules.min_p.log()
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits


def _floor(logits: torch.Tensor, rules: Rules) -> torch.Tensor:
    """The smallest logit that top-k and then top-p keep, [B, 1]."""
    vocabulary = logits.shape[-1]
    if logits.device.type == "cpu" and all(s.top_k <= CANDIDATES < vocabulary for s in rules.samplings):
        floor, is_told = _floor_among(logits, rules, CANDIDATES)
        if bool(is_told.all()):
            return floor
    return _floor_among(logits, rules, vocabulary)[0]


def _floor_among(logits: torch.Tensor, rules: Rules, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`_floor` by the `number` largest logits, and for each row whether they were enough to tell."""
    vocabulary = logits.shape[-1]
    ranks = torch.arange(number, device=logits.device)
    ordered = logits.topk(number).values.masked_fill(ranks >= rules.top_k, float("-inf"))
    # Where top-k keeps only some, the probabilities are those among the kept.
    is_limited = rules.top_k < vocabulary
    total = torch.where(is_limited, ordered.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))
    probabilities = (ordered - total).exp()
    before = probabilities.cumsum(-1) - probabilities
    # The token that reaches top_p is kept too; the first one always.
    kept = ((before < rules.top_p) & (ordered > float("-inf"))) | (ranks == 0)
    floor = ordered.masked_fill(~kept, float("inf")).amin(-1, keepdim=True)
    is_open = (rules.top_p >= 1) & ~is_limited
    return floor.masked_fill(is_open, float("-inf")), is_open | ~kept[:, -1:] | (number == vocabulary)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Gumbel noise fp32 [B, vocabulary] on the device of `seeds`, int64 [B]: a pure function of seed, position and token."""
    keys = _splitmix(_splitmix(seeds.clone()) + positions)
    tokens = torch.arange(vocabulary, device=seeds.device)
    bits = _splitmix(keys[:, None] + tokens * _STEP)
    # 53 random bits to a number above 0 and below 1.
    uniform = _shifted(bits, 11).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().log_().float().neg_()


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64, on int64 whose overflow wraps; in place, as new memory takes a processor as long."""
    for by, factor in zip((30, 27), _MIX, strict=True):
        x.bitwise_xor_(_shifted(x, by)).mul_(factor)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right: the sign is a bit like any other."""
    return (x >> by).bitwise_and_(2 ** (64 - by) - 1)
