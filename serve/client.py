"""The client side of the protocol: connect to a daemon, ask, cancel. One request at a time."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Self

from serve.connection import Connection, is_bad_request
from serve.errors import EngineError, RequestError, ServeError, UserError
from serve.pieces import Answer, Delta, Done, Piece, new_id, refusal
from serve.protocol import CREDIT_WINDOW, MAX_CONTROL_BYTES, MAX_MESSAGE_BYTES, NO_REQUEST, Code, Kind, Message, encode
from serve.runtime import Record
from serve.submission import Submission

# The daemon drops a question that no engine has answered for so long.
QUESTION_SECONDS = 300.0
ShowProgress = Callable[[str, int, int], None]


class Client:
    """A connection to one daemon. Made by `connect`; `adapter` answers what names no other."""

    def __init__(self, record: Record, adapter: str | None = None) -> None:
        self.record = record
        self.adapter = adapter
        self.info: dict[str, Any] = {}
        self.limits: dict[str, Any] = {}
        self._connection = Connection(record)
        self._answer: Answer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @property
    def is_lost(self) -> bool:
        """Whether the daemon has gone, or another one is in its place."""
        return self._connection.is_lost

    async def greet(self, show_progress: ShowProgress, *, until_ready: bool = True) -> None:
        """Say HELLO and wait until the run is loaded; raises `NoDaemonError`, `EngineError` or `RequestError`."""
        self._connection.hello()
        while True:
            message = await self._connection.hear()
            body = message.body
            if message.kind is Kind.PROGRESS:
                show_progress(body["stage"], body["done"], body["total"])
            elif message.kind is Kind.ERROR:
                is_engine = body["code"] == Code.ENGINE and message.request == NO_REQUEST
                raise EngineError(body["message"]) if is_engine else refusal(message)
            elif message.kind is Kind.WELCOME:
                self.limits = body["limits"]
                if body["state"] == "draining" and until_ready:
                    raise RequestError(Code.DRAINING, "the daemon is stopping; try: make chat", {})
                if body["state"] == "ready" or not until_ready:
                    self.info = body["info"]
                    return

    # One answer.

    async def ask(self, messages: list[dict[str, Any]], **options: Any) -> AsyncGenerator[Piece, None]:
        """The answer in pieces, `Done` last; `options` are the other fields of a `Submission`. Whoever breaks it off ends it.

        Raises `RequestError`, `NoDaemonError` if the daemon dies or hangs, `ServeError` if the text is not what was sent.
        """
        submission = Submission(messages, **{"adapter": self.adapter, **options})
        answer = Answer(submission.to_body(), self._connection.session)
        most = self.limits.get("message_bytes", MAX_MESSAGE_BYTES)
        self._connection.send_data(self._packed(answer.submit(), most))
        self._answer = answer
        watch = asyncio.create_task(self._watch(answer))
        try:
            while not isinstance(piece := await self._next(answer, watch), Done):
                if piece is not None:
                    yield piece
        finally:
            await self._leave(answer, watch)
        yield piece

    def cancel(self) -> None:
        """End the answer under way; `ask` then raises `RequestError` with E_CANCELLED."""
        if self._answer is not None:
            self._answer.is_cancelled = True
            self._send_cancel(self._answer)

    async def _next(self, answer: Answer, watch: "asyncio.Task[None]") -> Piece | None:
        """What the next message on data brings."""
        message = await self._connection.receive(watch)
        if is_bad_request(message) and message.request == answer.request and answer.session and not answer.is_anew:
            # Perhaps the daemon has forgotten our session: the next WELCOME brings one in which it can be asked anew.
            answer.session = b""
            self._connection.hello()
            return None
        piece = answer.take(message)
        # Credit is granted in lumps: a message for every delta would double the traffic.
        lump = max(self.limits.get("credit", CREDIT_WINDOW) // 2, 1)
        if isinstance(piece, Delta) and answer.num_deltas % lump == 0:
            self._connection.send_data(encode(Message(Kind.CREDIT, answer.request, {"count": lump})))
        return piece

    async def _watch(self, answer: Answer) -> None:
        """Control while an answer is under way: whether the daemon is there, knows us, and still reaches us with it."""
        connection = self._connection
        while True:
            message = await connection.hear(answer.request)
            if message.kind is Kind.WELCOME and answer.session != connection.session:
                answer.begin_anew(connection.session)
                connection.send_data(encode(answer.submit()))
            elif message.kind is Kind.PONG and message.request == answer.request:
                self._on_pong(answer, is_attached=message.body.get("attached", True))

    def _on_pong(self, answer: Answer, *, is_attached: bool) -> None:
        if answer.is_cancelled:
            # A CANCEL that went into a broken connection is lost.
            self._send_cancel(answer)
        # What is over for the daemon may lie here unread.
        is_attached = is_attached or self._connection.has_unread
        answer.num_unattached = 0 if is_attached else answer.num_unattached + 1
        # Twice: the first PING may have overtaken the SUBMIT.
        if answer.num_unattached == 2:
            answer.num_unattached = 0
            self._connection.send_data(encode(answer.resubmit()))

    async def _leave(self, answer: Answer, watch: "asyncio.Task[None]") -> None:
        is_abandoned = not (answer.is_over or watch.done() or self._connection.is_closed)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        if self._answer is answer:
            self._answer = None
        if is_abandoned:
            self._send_cancel(answer)

    def _send_cancel(self, answer: Answer) -> None:
        # The daemon remembers a CANCEL that is faster than its SUBMIT.
        self._connection.send_control(encode(Message(Kind.CANCEL, answer.request)))

    # Only between answers.

    async def status(self) -> dict[str, Any]:
        """What the daemon is doing."""
        return await self._question(Kind.STATUS)

    async def tokenize(self, messages: list[dict[str, Any]], adapter: str | None = None) -> dict[str, Any]:
        """How many `tokens` a conversation has, of the `context` that the adapter holds."""
        return await self._question(Kind.TOKENIZE, messages=messages, adapter=adapter)

    async def adapters(self) -> list[dict[str, Any]]:
        """What can answer: the fields of an `AdapterInfo` and its `key` each."""
        return list((await self._question(Kind.ADAPTERS))["adapters"])

    async def load(self, run: str) -> str:
        """Serve one more run; its adapter's key. For who started the daemon."""
        return str((await self._question(Kind.LOAD, run=run, admin=self.record.admin))["loaded"])

    async def unload(self, adapter: str) -> str:
        """Forget an adapter; its key."""
        return str((await self._question(Kind.UNLOAD, adapter=adapter, admin=self.record.admin))["unloaded"])

    async def drain(self, *, now: bool = False) -> dict[str, Any]:
        """Have the daemon leave when the open requests are over, or at once; its last status."""
        return await self._question(Kind.SHUTDOWN if now else Kind.DRAIN, admin=self.record.admin)

    async def _question(self, kind: Kind, **body: Any) -> dict[str, Any]:
        question = Message(kind, new_id(), body)
        frames = self._packed(question, self.limits.get("control_bytes", MAX_CONTROL_BYTES))
        reply = await self._reply(question.request, frames)
        if is_bad_request(reply):
            # Perhaps the connection was broken since the last word, and to the daemon a stranger spoke.
            self._connection.hello()
            while (await self._connection.hear()).kind is not Kind.WELCOME:
                pass
            reply = await self._reply(question.request, frames)
        if reply.kind is Kind.ERROR:
            raise refusal(reply)
        return reply.body

    async def _reply(self, request: bytes, frames: list[bytes]) -> Message:
        self._connection.send_control(frames)
        try:
            async with asyncio.timeout(QUESTION_SECONDS):
                while (message := await self._connection.hear()).request != request:
                    pass
        except TimeoutError:
            raise ServeError(f"{self.record.run} has not answered for {QUESTION_SECONDS:.0f} s; try again") from None
        return message

    def _packed(self, message: Message, most: int) -> list[bytes]:
        """The frames of a message; raises `UserError` for one that would make the daemon drop the connection."""
        frames = encode(message)
        if (size := len(frames[-1])) > most:
            raise UserError(f"the conversation is {size} bytes and {most} go through; try a shorter text")
        return frames


async def connect(
    record: Record,
    show_progress: ShowProgress = lambda *_: None,
    adapter: str | None = None,
    *,
    until_ready: bool = True,
) -> Client:
    """A client of a daemon that is ready to answer, unless it shall not wait for that; use it as a context manager."""
    client = Client(record, adapter)
    try:
        await client.greet(show_progress, until_ready=until_ready)
    except BaseException:
        client.__exit__()
        raise
    return client
