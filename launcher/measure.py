"""Measuring on held-out examples: mean loss, greedy answers, the share that is exact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from launcher import methods, models
from launcher.batches import collate, each_alone
from launcher.chat import TEXT, Message, prompt_ids, tokenize
from launcher.encoding import Example, count_trained
from launcher.loss import Trainee

# Room beyond the longest right answer: an answer that needs more is wrong anyway.
MARGIN = 16


def parts(examples: Sequence[Example], micro: int) -> list[list[Example]]:
    """The examples, `micro` of similar length at a time."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [ordered[first : first + micro] for first in range(0, len(ordered), micro)]


@torch.no_grad()
def summed_loss(
    trainee: Callable[..., torch.Tensor], part: Sequence[Example], device: torch.device
) -> tuple[float, int]:
    """(sum of the loss in nats, number of trained tokens) of a few examples, read at once."""
    return trainee(**collate(each_alone(part), device)).item(), count_trained(part)


@dataclass(frozen=True)
class Reading:
    """An example as a model reads it: of each trained token the loss fp32 [N] in nats, and the likeliest in its place."""

    losses: np.ndarray
    likeliest: np.ndarray


def read(trainee: Trainee, examples: Sequence[Example], micro: int, device: torch.device) -> list[Reading]:
    """The readings of all examples, `micro` of similar length at a time."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    found: dict[int, Reading] = {}
    for first in range(0, len(order), micro):
        part = order[first : first + micro]
        batch = collate(each_alone([examples[i] for i in part]), device)
        counts = [count_trained([examples[i]]) for i in part]
        losses, likeliest = (column.cpu().split(counts) for column in trainee.predictions(**batch))
        found |= {i: Reading(x.numpy(), y.numpy()) for i, x, y in zip(part, losses, likeliest, strict=True)}
    return [found[i] for i in range(len(examples))]


@dataclass(frozen=True)
class Said:
    """A greedy answer: all of it, or where `is_whole` is false its beginning."""

    text: str
    is_whole: bool


def foreseen(tokenizer: Any, example: Example, reading: Reading, stop_ids: Sequence[int]) -> Said:
    """What a reading shows of the greedy answer in place of the example's last one.

    As long as the likeliest tokens are the right ones, the model would have written them: an answer that is right needs no
    writing. Of another one this is the beginning up to the first other token.
    """
    places = np.flatnonzero(example.trained[1:]) + 1
    begin = np.flatnonzero(np.diff(places, prepend=-1) > 1)[-1]
    right, likeliest = example.ids[places[begin:]], reading.likeliest[begin:]
    others = np.flatnonzero(right != likeliest)
    ids = likeliest[: others[0] + 1] if len(others) else likeliest
    return Said(tokenizer.decode(ids, skip_special_tokens=True), bool(ids[-1] in stop_ids))


def has_answer(messages: list[Message]) -> bool:
    """Whether a conversation asks for something; plain text does not."""
    return messages[-1]["role"] != TEXT


def fits(tokenizer: Any, messages: list[Message], longest: int) -> bool:
    """Whether the question leaves room for an answer within `longest` tokens."""
    return len(prompt_ids(tokenizer, messages[:-1])) < longest


def most_tokens(tokenizer: Any, asked: Sequence[list[Message]]) -> int:
    """The most tokens that an answer to one of these gets: a little more than the longest right one has."""
    return MARGIN + max(len(tokenize(tokenizer, messages[-1]["content"])) for messages in asked)


def answer(
    model: Any,
    tokenizer: Any,
    asked: Sequence[list[Message]],
    stop_ids: Sequence[int],
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> list[str]:
    """Greedy answers to conversations, in place of their last turn and little longer than the longest of those.

    `tick` is called after every token.
    """
    prompts = [prompt_ids(tokenizer, messages[:-1]) for messages in asked]
    out = generate(model, prompts, most_tokens(tokenizer, asked), stop_ids, device, tick)
    return tokenizer.batch_decode(out, skip_special_tokens=True)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    stop_ids: Sequence[int],
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Greedy continuations int64 [B, <= max_tokens] of a left-padded batch, `model` bare or with its adapter."""
    num_prefix = methods.num_prefix(model)
    module = methods.bare(model)
    length = num_prefix + max(map(len, prompts))
    # Where a prefix lies in the cache, `generate` still wants ids for its positions; it does not read them.
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    mask[:, :num_prefix] = 1
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    room = module.config.max_position_embeddings - length
    with models.quiet():
        out = module.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False,
            max_new_tokens=min(max_tokens, room), past_key_values=methods.prefix_cache(model, len(prompts)),
            eos_token_id=list(stop_ids), pad_token_id=stop_ids[0], stopping_criteria=StoppingCriteriaList([_Ticking(tick)]),
        )  # fmt: skip
    return out[:, length:]


class _Ticking(StoppingCriteria):
    """Stops nothing: it is the one place where `generate` lets others look on."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        self._tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def share_exact(said: Sequence[str], right: Sequence[str]) -> float:
    """The share of answers that are right to the letter, but for space around them."""
    return share(a.strip() == b.strip() for a, b in zip(said, right, strict=True))


def share(values: Any) -> float:
    """The share of true values, to four digits."""
    values = list(values)
    return round(sum(values) / len(values), 4)
