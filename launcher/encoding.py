"""Conversations -> tokenised examples."""

from dataclasses import dataclass

from launcher.chat import Message, Tokenizer, render
from launcher.errors import UserError


@dataclass(frozen=True)
class Example:
    """A tokenised conversation; `trained[i]` says whether token i is predicted for the loss."""

    ids: list[int]
    trained: list[bool]


def encode(tokenizer: Tokenizer, conversations: list[list[Message]], max_length: int) -> list[Example]:
    """Tokenise; raises `UserError` for the conversations longer than `max_length`, which are never cut silently."""
    examples = []
    too_long = []
    for number, messages in enumerate(conversations, start=1):
        rendered = render(tokenizer, messages)
        if len(rendered.ids) > max_length:
            too_long.append((len(rendered.ids), number))
        examples.append(Example(rendered.ids, rendered.trained))
    if too_long:
        longest = max(too_long)[0]
        raise UserError(
            f"{len(too_long)} of {len(conversations)} examples are longer than {max_length} tokens (longest: {longest}), "
            f"the smaller of data.max_length and the model's context; try data.max_length={longest}, or shorten them"
        )
    return examples


def count_trained(batch: list[Example]) -> int:
    """Tokens that carry loss. The first token of a sequence is never predicted."""
    return sum(sum(example.trained[1:]) for example in batch)
