"""What the daemon remembers of a client, of a request that is not over, and for a while of one that is."""

import enum
import hashlib
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace

import msgpack

from serve.protocol import CREDIT_WINDOW, Message
from serve.submission import Submission

# How long an answer can be asked for again, and how much of them is kept at most.
REMEMBER_SECONDS = 300.0
MAX_REMEMBERED = 256
MAX_REMEMBERED_CHARACTERS = 4 * 2**20


class Lane(enum.Enum):
    """Which of the two sockets."""

    DATA = "data"
    CONTROL = "control"


class Sent(enum.Enum):
    """What became of a message to a client."""

    OK = "ok"
    FULL = "full"  # it reads too slowly, try again later
    GONE = "gone"


@dataclass(eq=False)
class Session:
    """One client. `control` is its routing id there; `secret` lets it speak on the data socket, and come back.

    `gone_at` is when it was found to have gone; `has_spoken` on after its HELLO; `cancelled` are ids whose CANCEL overtook their SUBMIT.
    """

    control: bytes
    number: int
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    last_seen: float = field(default_factory=time.monotonic)
    last_probe: float = field(default_factory=time.monotonic)
    gone_at: float | None = None
    has_spoken: bool = False
    cancelled: list[bytes] = field(default_factory=list)

    def seen(self) -> None:
        """It is there."""
        self.last_seen, self.gone_at = time.monotonic(), None

    def spoke(self) -> None:
        """It is there, and wants something."""
        self.seen()
        self.has_spoken = True


@dataclass(eq=False)
class OpenRequest:
    """A SUBMIT without its DONE or ERROR yet. `packed` are the messages of `asked`, once they are with an engine. `texts` are the deltas that were sent, `pending` and `accepted_due` were not.

    `engine` is the number of the engine that answers, None as long as there is none. `lost_at` is when its client could
    no longer be reached as `data`.
    """

    id: bytes
    data: bytes
    session: Session
    asked: Submission
    packed: bytes = b""
    engine: int | None = None
    num_starts: int = 0
    credit: int = CREDIT_WINDOW
    texts: list[str] = field(default_factory=list)
    pending: str = ""
    ids: list[int] = field(default_factory=list)
    sent_ids: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    accepted: Message | None = None
    accepted_due: Message | None = None
    is_in_slot: bool = False
    place: int | None = None
    terminal: Message | None = None
    arrived: float = field(default_factory=time.monotonic)
    last_delta: float | None = None
    lost_at: float | None = None

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.texts) + self.pending

    @property
    def digest(self) -> str:
        """The SHA-256 of the answer so far."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def pack(self) -> None:
        """Keep the conversation in one piece: as objects, one of thousands of turns is megabytes."""
        self.packed = msgpack.packb(self.asked.messages)
        self.asked = replace(self.asked, messages=[])

    def whole(self) -> Submission:
        """What was asked, with the conversation."""
        return replace(self.asked, messages=msgpack.unpackb(self.packed)) if self.packed else self.asked

    def replay(self, data: bytes, have: int) -> None:
        """Its client is back as `data` and has the first `have` deltas; the rest is due again, as one."""
        self.data, self.credit, self.lost_at = data, CREDIT_WINDOW, None
        self.accepted_due = self.accepted
        self.texts, self.pending = self.texts[:have], "".join(self.texts[have:]) + self.pending
        self.ids = [token for ids in self.sent_ids[have:] for token in ids] + self.ids
        del self.sent_ids[have:]


@dataclass
class Ended:
    """A request that is over, and its deltas in one piece: one by one they take a hundred times their text."""

    request: OpenRequest
    deltas: bytes
    num_characters: int
    at: float = field(default_factory=time.monotonic)


class Remembered:
    """Requests that are over, the newest ones."""

    def __init__(self) -> None:
        self._requests: OrderedDict[bytes, Ended] = OrderedDict()
        self._characters = 0

    def add(self, request: OpenRequest) -> None:
        """Remember one more, and forget what is too much or too old."""
        ended = Ended(request, msgpack.packb([request.texts, request.sent_ids]), len(request.text))
        request.texts, request.sent_ids = [], []
        self._requests[request.id] = ended
        self._characters += ended.num_characters
        self.tidy()

    def find(self, request_id: bytes) -> OpenRequest | None:
        """The request of that id, without its deltas; None if it is not remembered."""
        ended = self._requests.get(request_id)
        return ended.request if ended else None

    def take(self, request_id: bytes) -> OpenRequest:
        """The same with its deltas, no longer remembered."""
        ended = self._requests.pop(request_id)
        self._characters -= ended.num_characters
        ended.request.texts, ended.request.sent_ids = msgpack.unpackb(ended.deltas)
        return ended.request

    def tidy(self) -> None:
        """Forget what is too old, too long or too much."""
        while self._requests:
            oldest, ended = next(iter(self._requests.items()))
            is_too_much = len(self._requests) > MAX_REMEMBERED or self._characters > MAX_REMEMBERED_CHARACTERS
            if not is_too_much and time.monotonic() - ended.at < REMEMBER_SECONDS:
                return
            del self._requests[oldest]
            self._characters -= ended.num_characters
