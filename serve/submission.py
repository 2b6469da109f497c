"""What a SUBMIT asks for, checked before the engine sees it."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve.engine import Sampling
from serve.protocol import Code, ProtocolError

ROLES = ("system", "user", "assistant")
# Seeds are drawn into signed 64-bit generators.
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Submission:
    """A conversation (`role` and `content` each), how to sample, and at most how many tokens (None: to the end)."""

    messages: list[dict[str, Any]]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None

    def to_body(self) -> dict[str, Any]:
        """The body of the SUBMIT message."""
        return {"messages": self.messages, "max_tokens": self.max_tokens, **dataclasses.asdict(self.sampling)}


def parse(body: dict[str, Any], request: bytes) -> Submission:
    """Read a SUBMIT's body; raises `ProtocolError` naming the first wrong field."""

    def check(name: str, value: Any, is_valid: bool, rule: str) -> Any:
        if not is_valid:
            raise ProtocolError(Code.BAD_REQUEST, f"{name} must be {rule}, not {str(value)[:40]!r}", request)
        return value

    defaults = Sampling()
    temperature = body.get("temperature", defaults.temperature)
    top_p = body.get("top_p", defaults.top_p)
    top_k = body.get("top_k", defaults.top_k)
    seed = body.get("seed", defaults.seed)
    limit = body.get("max_tokens")
    check("temperature", temperature, _is_number(temperature) and 0 <= temperature <= 100, "a number from 0 to 100")
    check("top_p", top_p, _is_number(top_p) and 0 < top_p <= 1, "a number above 0, at most 1")
    check("top_k", top_k, type(top_k) is int and 0 <= top_k < 2**31, "a whole number, 0 for no limit")
    check("seed", seed, type(seed) is int and 0 <= seed <= MAX_SEED, "a whole number below 2**63")
    check("max_tokens", limit, limit is None or (type(limit) is int and limit > 0), "a whole number above 0")
    messages = _parse_messages(body["messages"], check)
    return Submission(messages, Sampling(float(temperature), top_k, float(top_p), seed), limit)


def _parse_messages(messages: list[Any], check: Callable[[str, Any, bool, str], Any]) -> list[dict[str, Any]]:
    check("messages", messages, len(messages) > 0, "at least one turn")
    for turn in messages:
        check("messages", turn, isinstance(turn, dict), "a list of maps with role and content")
        check("role", turn.get("role"), turn.get("role") in ROLES, f"one of {', '.join(ROLES)}")
        check("content", turn.get("content"), isinstance(turn.get("content"), str), "text")
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
