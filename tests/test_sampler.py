"""Sampling: the same filters as transformers, the right frequencies, and noise that only seed and position decide."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve import sampler
from serve.engine import Sampling
from serve.sampler import Sampler, draw, gumbel, penalise, truncate

CPU = torch.device("cpu")


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
    got = truncate(drawn, samplings)
    for row, sampling in enumerate(samplings):
        assert torch.equal(got[row].isfinite(), stock(drawn[row], sampling).isfinite()), sampling
        assert torch.allclose(got[row], stock(drawn[row], sampling)), sampling


def test_a_flat_nucleus_is_found_beyond_the_first_candidates():
    flat = logits(1, 5000, scale=0.01)
    kept = truncate(flat, [Sampling(1.0, top_p=0.9)]).isfinite().sum()
    assert kept > sampler.CANDIDATES and abs(int(kept) - 4500) < 60


def test_a_repetition_penalty_is_that_of_transformers():
    row, ids = logits(1)[0], torch.tensor([[5, 9, 9, 2000]])
    seen = torch.zeros(3000, dtype=torch.bool)
    seen[ids[0]] = True
    assert torch.equal(penalise(row, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, row[None].clone())[0])


def test_a_penalised_token_is_remembered_from_the_prompt_and_from_the_answer():
    ours = Sampler(2, 10, CPU)
    ours.start(0, [3], Sampling(repetition_penalty=2.0))
    ours.start(1, [3], Sampling())
    row = torch.tensor([0.0, 1.0, 5.0, 6.0, *[0.0] * 6])

    def choose():
        return ours.choose(torch.stack([row, row]), [0, 1], [1, 1])

    assert choose() == [2, 3]
    # 2 is penalised now as well: 6 / 2 beats 5 / 2.
    assert choose() == [3, 3]


def test_frequencies_are_the_probabilities():
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    number = 20_000
    tokens = draw(row.expand(number, 4), [Sampling(1.0, seed=seed) for seed in range(number)], [7] * number)
    measured = torch.bincount(tokens, minlength=4) / number
    assert torch.allclose(measured, row.softmax(-1), atol=0.012)
    # And along the positions of one seed.
    tokens = draw(row.expand(number, 4), [Sampling(1.0, seed=1)] * number, list(range(number)))
    assert torch.allclose(torch.bincount(tokens, minlength=4) / number, row.softmax(-1), atol=0.012)


def test_noise_depends_on_seed_position_and_token_only():
    like = torch.zeros(3, 1000)
    noise = gumbel([1, 2, 1], [5, 5, 6], like)
    assert torch.equal(noise[0], gumbel([1], [5], like[:1])[0])
    assert len({tuple(row[:5].tolist()) for row in noise}) == 3
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.07
    assert torch.corrcoef(noise)[0, 1:].abs().max() < 0.1
    assert torch.equal(gumbel([2**63 - 1], [0], like[:1]), gumbel([2**63 - 1], [0], like[:1]))


def test_what_is_not_a_number_is_told_and_does_not_spread():
    ours = Sampler(3, 50, CPU)
    for slot, sampling in enumerate([Sampling(), Sampling(1.0, seed=1), Sampling(1.0, top_p=0.9, seed=2)]):
        ours.start(slot, [1], sampling)
    good = logits(3, 50)
    expected = ours.choose(good.clone(), [0, 1, 2], [4, 4, 4])
    bad = good.clone()
    bad[1] = float("nan")
    assert ours.choose(bad, [0, 1, 2], [4, 4, 4]) == [expected[0], -1, expected[2]]
    bad[0, 3], bad[2] = float("inf"), float("-inf")
    assert ours.choose(bad, [0, 1, 2], [4, 4, 4]) == [-1, -1, -1]
