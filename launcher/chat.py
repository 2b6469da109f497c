"""Conversation -> token ids: the one renderer that training, evaluation and the daemon share.

A conversation is cut into segments at the borders of the assistant's turns and each segment is tokenised by itself. So the
ids of a prompt are, by construction, a prefix of the ids that were trained, for every template and every tokenizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from launcher.errors import UserError

ROLES = ("system", "user", "assistant")
# Plain text is a conversation of one message with this role: no template, every token trained.
TEXT = "text"


class Message(TypedDict):
    """One turn: `role` is system, user or assistant, or `TEXT`."""

    role: str
    content: str


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None
    eos_token_id: int | None
    all_special_ids: list[int]

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render a conversation as text."""

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """Tokenise text: {"input_ids": [...]}."""


@dataclass(frozen=True)
class Rendered:
    """A whole conversation: `ids`, and for each id whether it is trained (the assistant's words and its stop token)."""

    ids: list[int]
    trained: list[bool]


def prompt_ids(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    """The ids after which the assistant speaks: every turn so far and the generation prompt."""
    return [i for text in prompt_texts(tokenizer, messages) for i in tokenize(tokenizer, text)]


def prompt_texts(tokenizer: Tokenizer, messages: list[Message]) -> Iterator[str]:
    """The text of these ids in segments, each rendered when it is asked for."""
    return (text for text, _ in _segments(tokenizer, messages, prompt=True))


def render(tokenizer: Tokenizer, messages: list[Message]) -> Rendered:
    """The ids of a conversation and which of them carry loss, decided by position, never by token id."""
    if messages[0]["role"] == TEXT:
        # With the special tokens that the base was trained on, and the one that ends a document.
        ids = tokenizer(messages[0]["content"])["input_ids"]
        ids += [tokenizer.eos_token_id] if ids[-1:] != [tokenizer.eos_token_id] else []
        return Rendered(ids, [True] * len(ids))
    ids = []
    trained: list[bool] = []
    for text, is_answer in _segments(tokenizer, messages, prompt=False):
        segment = tokenize(tokenizer, text)
        stop = _stop_position(tokenizer, segment) if is_answer else -1
        ids += segment
        trained += [position <= stop for position in range(len(segment))]
    return Rendered(ids, trained)


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an assistant's turn under this template, as they are trained."""
    rendered = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    last = max(i for i, is_trained in enumerate(rendered.trained) if is_trained)
    return sorted({rendered.ids[last], *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})


def _segments(tokenizer: Tokenizer, messages: list[Message], *, prompt: bool) -> Iterator[tuple[str, bool]]:
    """The rendered text in pieces, each with whether it is the assistant's answer."""
    done = ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _template(tokenizer, messages[:i], add_generation_prompt=True)
            after = _template(tokenizer, messages[: i + 1], add_generation_prompt=False)
            yield _after(done, before), False
            yield _after(before, after), True
            done = after
    yield _after(done, _template(tokenizer, messages, add_generation_prompt=prompt)), False


def _template(tokenizer: Tokenizer, messages: list[Message], *, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template refuses this conversation ({error}); check the roles") from None


def _after(start: str, text: str) -> str:
    if not text.startswith(start):
        raise UserError(
            "this chat template rewrites earlier turns, so it cannot be trained; try a card with another one in configs/models/"
        )
    return text[len(start) :]


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a segment. No special tokens are added: the template has written them, and a second BOS would do harm."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _stop_position(tokenizer: Tokenizer, answer: list[int]) -> int:
    """The position of the end-of-turn token, the last special token of an answer; what follows it is not trained."""
    special = set(tokenizer.all_special_ids)
    for position in reversed(range(len(answer))):
        if answer[position] in special:
            return position
    raise UserError("this chat template ends the assistant's turn with no stop token, so a model could never stop")
