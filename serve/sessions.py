"""A conversation as a list of turns that always alternate. Pure."""

from dataclasses import dataclass
from typing import Any

USER = "user"
ANSWER = "assistant"


@dataclass(frozen=True)
class Turn:
    """Who said what; an answer may have been interrupted."""

    role: str
    text: str
    is_interrupted: bool = False


class Conversation:
    """Begins with the user; every question that stays has an answer."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def add_user(self, text: str) -> None:
        """The user's turn; an answer, or `withdraw`, must follow."""
        assert not self.turns or self.turns[-1].role == ANSWER, "the user has spoken already"
        self.turns.append(Turn(USER, text))

    def add_answer(self, text: str, *, is_interrupted: bool = False) -> None:
        """The answer, whole or as far as it came; a question that got not a word is withdrawn."""
        assert self.turns and self.turns[-1].role == USER, "nobody has asked"
        if is_interrupted and not text:
            self.withdraw()
        else:
            self.turns.append(Turn(ANSWER, text, is_interrupted))

    def withdraw(self) -> None:
        """Take back a question without an answer."""
        assert self.turns and self.turns[-1].role == USER, "there is no open question"
        self.turns.pop()

    def reset(self) -> None:
        """Begin again."""
        self.turns.clear()

    def messages(self) -> list[dict[str, Any]]:
        """The turns for the wire. That an answer was interrupted is for the eye, the model reads only its words."""
        return [{"role": turn.role, "content": turn.text} for turn in self.turns]
