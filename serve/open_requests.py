"""What the daemon remembers of a client and of a request that is not over."""

import enum
import secrets
import time
from dataclasses import dataclass, field

from serve.protocol import CREDIT_WINDOW, Message


class Lane(enum.Enum):
    """Which of the two sockets."""

    DATA = "data"
    CONTROL = "control"


class Sent(enum.Enum):
    """What became of a message to a client."""

    OK = "ok"
    FULL = "full"  # it reads too slowly, try again later
    GONE = "gone"


@dataclass
class Session:
    """One client. `control` is its routing id there; `secret` lets it speak on the data socket too."""

    control: bytes
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    last_seen: float = field(default_factory=time.monotonic)
    last_probe: float = field(default_factory=time.monotonic)


@dataclass
class OpenRequest:
    """A SUBMIT without its DONE or ERROR yet. `pending` is text that found no credit."""

    id: bytes
    data: bytes
    session: Session
    credit: int = CREDIT_WINDOW
    num_deltas: int = 0
    pending: str = ""
    tokens: int = 0
    terminal: Message | None = None
