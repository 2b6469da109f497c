"""What a SUBMIT asks for, checked before an engine sees it."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve.engine import Sampling
from serve.protocol import Code, ProtocolError

ROLES = ("system", "user", "assistant")
# Seeds are hashed as signed 64-bit numbers.
MAX_SEED = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_TOKENS = 2**31


@dataclass(frozen=True)
class Submission:
    """A conversation (`role` and `content` each) and how it shall be answered.

    `max_tokens` None: to the end. `adapter` None: the first that is served. `deadline_ms` counts from the arrival.
    `wants_ids`: the deltas carry the tokens too.
    """

    messages: list[dict[str, Any]]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    deadline_ms: int | None = None
    wants_ids: bool = False

    def to_body(self) -> dict[str, Any]:
        """The body of the SUBMIT message."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "sampling"}
        return {**fields, **dataclasses.asdict(self.sampling)}


Check = Callable[[str, Any, bool, str], None]


def parse(body: dict[str, Any], request: bytes) -> Submission:
    """Read a SUBMIT's body; raises `ProtocolError` naming the first wrong field."""

    def check(name: str, value: Any, is_valid: bool, rule: str) -> None:
        if not is_valid:
            raise ProtocolError(Code.BAD_REQUEST, f"{name} must be {rule}, not {_described(value)}", request)

    limit, deadline, adapter = body.get("max_tokens"), body.get("deadline_ms"), body.get("adapter")
    wants_ids = body.get("wants_ids", False)
    check("max_tokens", limit, limit is None or _is_whole(limit, 1, MAX_TOKENS), "a whole number above 0")
    rule = f"a whole number of milliseconds from 1 to {MAX_DEADLINE_MS}"
    check("deadline_ms", deadline, deadline is None or _is_whole(deadline, 1, MAX_DEADLINE_MS), rule)
    check("adapter", adapter, adapter is None or isinstance(adapter, str), "a name, or name@digest")
    check("wants_ids", wants_ids, isinstance(wants_ids, bool), "true or false")
    messages = parse_messages(body.get("messages"), request)
    return Submission(
        messages, _parse_sampling(body, check), limit, _parse_stops(body, check), adapter, deadline, wants_ids
    )


def parse_messages(messages: Any, request: bytes) -> list[dict[str, Any]]:
    """The turns of a conversation, role and content only; raises `ProtocolError`."""

    def require(is_valid: bool, name: str, rule: str) -> None:
        if not is_valid:
            raise ProtocolError(Code.BAD_REQUEST, f"{name} must be {rule}", request)

    require(isinstance(messages, list) and len(messages) > 0, "messages", "a list of at least one turn")
    for turn in messages:
        require(isinstance(turn, dict), "messages", "a list of maps with role and content")
        require(turn.get("role") in ROLES, "role", f"one of {', '.join(ROLES)}")
        require(isinstance(turn.get("content"), str), "content", "text")
    # Made anew only where there is more in it: there may be thousands.
    return [turn if len(turn) == 2 else {"role": turn["role"], "content": turn["content"]} for turn in messages]


def _parse_sampling(body: dict[str, Any], check: Check) -> Sampling:
    values = {f.name: body.get(f.name, f.default) for f in dataclasses.fields(Sampling)}
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "temperature": (lambda v: _is_number(v, 0, 100), "a number from 0 to 100"),
        "top_k": (lambda v: _is_whole(v, 0, 2**31), "a whole number, 0 for no limit"),
        "top_p": (lambda v: _is_number(v, 0, 1) and v > 0, "a number above 0, at most 1"),
        "min_p": (lambda v: _is_number(v, 0, 1), "a number from 0 to 1"),
        "repetition_penalty": (lambda v: _is_number(v, 0.01, 100), "a number from 0.01 to 100"),
        "seed": (lambda v: v is None or _is_whole(v, 0, MAX_SEED), "a whole number below 2**63"),
    }
    for name, (is_valid, rule) in rules.items():
        check(name, values[name], is_valid(values[name]), rule)
    floats = {name: float(values[name]) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
    return Sampling(**{**values, **floats})


def _parse_stops(body: dict[str, Any], check: Check) -> tuple[str, ...]:
    stops = body.get("stop", ())
    is_list = isinstance(stops, list | tuple) and len(stops) <= MAX_STOPS
    rule = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
    check("stop", stops, is_list and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops), rule)
    return tuple(stops)


def _described(value: Any) -> str:
    """A wrong value for a message: lists and maps, megabytes perhaps, by their type."""
    return repr(str(value)[:40]) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _is_number(value: Any, low: float, high: float) -> bool:
    # `type(...) in` and not isinstance: True is an int for isinstance.
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high
