"""Sampling: the same filters as transformers, the right frequencies, and noise that only seed and position decide."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve import sampler
from serve.engine import Sampling
from serve.sampler import LEAST_TEMPERATURE, Rules, Sampler, draw, gumbel, pack, penalise, truncate

CPU = torch.device("cpu")
# What the first release drew.
NOISE = [
    [0.2097279131412506, -0.30970749258995056, -0.8865508437156677, -0.212015762925148],
    [1.8126534223556519, 0.15233448147773743, 3.4813451766967773, 4.248778820037842],
    [-0.942861020565033, -1.2545634508132935, 0.02420992963016033, -0.39191964268684387],
]
TOKENS = [1388, 421, 2369]


def rules(samplings, positions=None):
    """`samplings` for as many rows."""
    positions = positions or [0] * len(samplings)
    return Rules(samplings, pack(samplings, [(position, row, row) for row, position in enumerate(positions)]))


def noise_of(seeds, positions, vocabulary):
    return gumbel(torch.tensor(seeds), torch.tensor(positions), vocabulary)


def choose(ours, logits, slots, positions):
    return ours.choose(logits, ours.plan(slots, positions))


def logits(rows=4, vocabulary=3000, scale=3.0, seed=0):
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def stock(row, sampling):
    """The filters of transformers, in its order."""
    ids, row = torch.zeros(1, 1, dtype=torch.long), TemperatureLogitsWarper(sampling.temperature)(None, row[None])
    if sampling.top_k:
        row = TopKLogitsWarper(sampling.top_k)(ids, row)
    if sampling.top_p < 1:
        row = TopPLogitsWarper(sampling.top_p)(ids, row)
    if sampling.min_p:
        row = MinPLogitsWarper(sampling.min_p)(ids, row)
    return row[0]


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_filters_are_those_of_transformers_each_row_by_its_own(scale):
    samplings = [
        Sampling(0.7, top_k=40), Sampling(1.3, top_p=0.9), Sampling(1.0, min_p=0.1), Sampling(2.0),
        Sampling(0.9, top_k=300, top_p=0.5, min_p=0.02), Sampling(1.0, top_k=2000, top_p=0.99), Sampling(1.0, top_k=1),
    ]  # fmt: skip
    drawn = logits(len(samplings), scale=scale)
    got = truncate(drawn, rules(samplings))
    for row, sampling in enumerate(samplings):
        assert torch.equal(got[row].isfinite(), stock(drawn[row], sampling).isfinite()), sampling
        assert torch.allclose(got[row], stock(drawn[row], sampling)), sampling


def test_a_flat_nucleus_is_found_beyond_the_first_candidates():
    flat = logits(1, 5000, scale=0.01)
    kept = truncate(flat, rules([Sampling(1.0, top_p=0.9)])).isfinite().sum()
    assert kept > sampler.CANDIDATES and abs(int(kept) - 4500) < 60


def test_a_repetition_penalty_is_that_of_transformers():
    row, ids = logits(1)[0], torch.tensor([[5, 9, 9, 2000]])
    seen = torch.zeros(3000, dtype=torch.bool)
    seen[ids[0]] = True
    assert torch.equal(
        penalise(row, seen, torch.tensor(1.3)), RepetitionPenaltyLogitsProcessor(1.3)(ids, row[None].clone())[0]
    )


def test_a_penalised_token_is_remembered_from_the_prompt_and_from_the_answer():
    ours = Sampler(2, 10, CPU)
    ours.start(0, [3], Sampling(repetition_penalty=2.0))
    ours.start(1, [3], Sampling())
    row = torch.tensor([0.0, 1.0, 5.0, 6.0, *[0.0] * 6])

    assert choose(ours, torch.stack([row, row]), [0, 1], [1, 1]) == [2, 3]
    # 2 is penalised now as well: 6 / 2 beats 5 / 2.
    assert choose(ours, torch.stack([row, row]), [0, 1], [2, 2]) == [3, 3]
    # Another request in the same slot has seen none of it.
    ours.free(0)
    ours.start(0, [3], Sampling(repetition_penalty=2.0))
    assert choose(ours, torch.stack([row, row]), [1, 0], [3, 1]) == [3, 2]


def test_what_is_next_to_no_temperature_is_greedy():
    ours = Sampler(2, 3000, CPU)
    ours.start(0, [1], Sampling(5e-324, seed=1))
    ours.start(1, [1], Sampling(LEAST_TEMPERATURE, seed=1))
    drawn = logits(2)
    # As cold as allowed, a draw is the most likely token, too.
    assert choose(ours, drawn.clone(), [0, 1], [4, 4]) == drawn.argmax(-1).tolist()


def test_a_seed_draws_what_it_always_drew():
    """An answer that was kept with its seed can be had again, also from a later release."""
    assert torch.allclose(noise_of([1, 2, 2**63 - 1], [0, 5, 9], 4), torch.tensor(NOISE), atol=1e-6)
    ours = Sampler(3, 3000, CPU)
    for slot in range(3):
        ours.start(slot, [1, 7], Sampling(1.2, top_k=900, top_p=0.95, min_p=0.001, repetition_penalty=1.3, seed=slot))
    assert choose(ours, logits(3), [2, 0, 1], [3, 4, 5]) == TOKENS


def test_frequencies_are_the_probabilities():
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    number = 20_000
    tokens = draw(row.expand(number, 4), rules([Sampling(1.0, seed=seed) for seed in range(number)], [7] * number))
    measured = torch.bincount(tokens, minlength=4) / number
    assert torch.allclose(measured, row.softmax(-1), atol=0.012)
    # And along the positions of one seed.
    tokens = draw(row.expand(number, 4), rules([Sampling(1.0, seed=1)] * number, list(range(number))))
    assert torch.allclose(torch.bincount(tokens, minlength=4) / number, row.softmax(-1), atol=0.012)


def test_noise_depends_on_seed_position_and_token_only():
    noise = noise_of([1, 2, 1], [5, 5, 6], 1000)
    assert torch.equal(noise[0], noise_of([1], [5], 1000)[0])
    assert len({tuple(row[:5].tolist()) for row in noise}) == 3
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.07
    assert torch.corrcoef(noise)[0, 1:].abs().max() < 0.1
    assert noise_of([2**63 - 1], [0], 1000).isfinite().all()


def test_what_is_not_a_number_is_told_and_does_not_spread():
    ours = Sampler(3, 50, CPU)
    for slot, sampling in enumerate([Sampling(), Sampling(1.0, seed=1), Sampling(1.0, top_p=0.9, seed=2)]):
        ours.start(slot, [1], sampling)
    good = logits(3, 50)
    expected = choose(ours, good.clone(), [0, 1, 2], [4, 4, 4])
    bad = good.clone()
    bad[1] = float("nan")
    assert choose(ours, bad.clone(), [0, 1, 2], [4, 4, 4]) == [expected[0], -1, expected[2]]
    bad[0, 3], bad[2] = float("inf"), float("-inf")
    assert choose(ours, bad, [0, 1, 2], [4, 4, 4]) == [-1, -1, -1]


class Transfers(TorchDispatchMode):
    """Writes down what passes between the host and `meta`, a device without numbers that stands for a GPU."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operator.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        is_there = any(tensor.is_meta for tensor in tensors)
        if name in ("to", "_to_copy"):
            is_target = torch.device(kwargs.get("device") or tensors[0].device).type == "meta"
            if is_there and not is_target:
                self.seen.append("to host")
                return torch.zeros_like(tensors[0], device=CPU)
            if is_target and not is_there:
                self.seen.append("to device")
        elif is_there and name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal"):
            self.seen.append(name)
        # A tensor of the host that an operator takes along is moved.
        elif is_there and any(not t.is_meta and t.dim() for t in tensors):
            self.seen.append(f"to device for {name}")
        return operator(*args, **kwargs)


class Made(TorchFunctionMode):
    """Writes down the tensors that are made there of Python's numbers."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and torch.device(kwargs.get("device") or CPU).type == "meta":
            self.seen.append("to device")
        return function(*args, **kwargs)


def transfers(function, *args):
    """What `function` returns, and what passed meanwhile."""
    seen = []
    with Made(seen), Transfers(seen):
        return function(*args), seen


@pytest.mark.parametrize(
    "others",
    [
        [Sampling(1.0, seed=1)],
        [Sampling(0.7, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=1), Sampling(1.0, seed=2)],
        [Sampling(repetition_penalty=1.2)],
    ],
)
def test_a_device_is_told_once_and_waited_for_once(others):
    ours = Sampler(4, 3000, torch.device("meta"))
    for slot, sampling in enumerate([Sampling(), *others]):
        ours.start(slot, [1], sampling)
    slots = list(range(1 + len(others)))
    plan, seen = transfers(ours.plan, slots, [4] * len(slots))
    assert seen == ["to device"]
    _, seen = transfers(ours.choose, torch.zeros(len(slots), 3000, device="meta"), plan)
    assert seen == ["to host"]
    assert transfers(ours.plan, [0], [4])[1] == []
