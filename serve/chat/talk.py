"""A conversation with a daemon: who answers, one action at a time, how full the context is, a daemon that comes and goes."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from serve import runtime, starter
from serve.chat.conversation import Conversation
from serve.chat.conversation_events import Begin, Event
from serve.chat.conversation_file import ConversationFile
from serve.chat.phrases import say
from serve.chat.screen import Screen, prose
from serve.client import Client, ShowProgress, connect
from serve.engine import BASE, AdapterError, AdapterInfo, resolve
from serve.errors import EngineError, NoDaemonError, RequestError, ServeError, UserError
from serve.pieces import Done
from serve.protocol import Code
from serve.starter import Origin

# How long to wait between two looks for a daemon, from the first to the last.
FIRST_DELAY, LAST_DELAY = 0.1, 8.0
# How long a busy engine may take to count: the person waits, and the next answer tells the count, too.
COUNT_SECONDS = 3.0


class Talk:
    """What `serve.chat.actions` act on. `reconnect` finds the daemon again after it was restarted, or raises `NoDaemonError`.

    `may_start`: whether this client may start a daemon that outlives it.
    """

    screen: Screen

    def __init__(
        self,
        client: Client,
        reconnect: Callable[[ShowProgress], Awaitable[Client]],
        file: ConversationFile,
        *,
        may_start: bool = False,
    ) -> None:
        self.client = client
        self.file = file
        self.may_start = may_start
        self.attached: list[str] = []
        self.last: Done | None = None
        self.used = 0
        self.rate = 0.0
        self.state = ""
        self._reconnect = reconnect
        self._asking: list[Client] = []
        self.is_stopped = False
        self._action: asyncio.Future[None] | None = None

    @property
    def conversation(self) -> Conversation:
        """What stands."""
        return self.file.conversation

    @property
    def adapters(self) -> list[str]:
        """The names of those who can answer."""
        return list(dict.fromkeys(adapter["name"] for adapter in self.client.info["adapters"]))

    @property
    def adapter(self) -> str:
        """Who answers: a name, or name@digest."""
        return self.conversation.adapter or self.client.adapter or self.adapters[0]

    @property
    def context(self) -> int:
        """The most tokens that question, answer and all before them may have."""
        info, name = self.client.info, self.adapter.partition("@")[0]
        return int(next((a["context"] for a in info["adapters"] if a["name"] == name), info["context"]))

    @property
    def own_system(self) -> str:
        """The system turn that who answers was trained with: what is read where the person has given none."""
        return self.require_adapter(self.adapter).system if self.key(self.adapter) else ""

    async def refresh(self) -> None:
        """Learn who can answer now: adapters come and go while a daemon serves."""
        client = await self.connected()
        client.info = {**client.info, "adapters": await client.adapters()}

    def key(self, name: str) -> str:
        """The key, name@digest, of who answers to a name; "" if nobody does."""
        try:
            return self.require_adapter(name).key
        except UserError:
            return ""

    def require_adapter(self, name: str) -> AdapterInfo:
        """Who answers to a name; raises `UserError` if nobody does."""
        known = {field.name for field in dataclasses.fields(AdapterInfo)}
        infos = [{key: each[key] for key in known & each.keys()} for each in self.client.info["adapters"]]
        try:
            return resolve(tuple(AdapterInfo(**info) for info in infos), name)
        except AdapterError as fault:
            raise UserError(str(fault)) from None

    # Doing one thing at a time, until it is done or Ctrl-C.

    async def do(self, action: Awaitable[None]) -> None:
        """Carry out what a line asked for, and show what went wrong."""
        self._action = running = asyncio.ensure_future(action)
        try:
            await asyncio.wait([running])
            if not running.cancelled() and (fault := running.exception()):
                if not isinstance(fault, ServeError):
                    raise fault
                self.tell("error", text=fault)
        finally:
            self._action = None
            self.state = ""
            self.screen.show([])

    def interrupt(self) -> bool:
        """Ctrl-C: stop what is under way; False if nothing is."""
        self.is_stopped = True
        for client in self._asking:
            client.cancel()
        if self._action is not None and not self._asking:
            self._action.cancel()
        return self._action is not None

    @contextlib.contextmanager
    def asking(self, clients: Sequence[Client]) -> Iterator[None]:
        """Meanwhile Ctrl-C cancels what these clients have asked; an action is not cut short then."""
        self._asking += clients
        try:
            yield
        finally:
            self._asking.clear()

    def tell(self, phrase: str, **values: object) -> None:
        """Print a phrase."""
        self.screen.print(prose(say(phrase, **values)))

    def happen(self, *events: Event) -> None:
        """Let events happen to the conversation; what the disk has against it is shown."""
        if fault := self.file.append(*events):
            self.tell("error", text=fault)

    def begin(self) -> None:
        """This client goes on with the conversation from here."""
        self.happen(Begin(self.client.record.run, self.client.info["model"], self.adapter, time.time()))

    # The context.

    async def recount(self) -> None:
        """Have the daemon count what stands before the next question, files that wait for it too; without one the count stays."""
        question = {"role": "user", "content": "\n\n".join(self.attached)}
        messages: list[dict[str, Any]] = [*self.conversation.messages(), question]
        try:
            async with asyncio.timeout(COUNT_SECONDS):
                self.used = (await self.client.tokenize(messages, self.adapter))["tokens"]
        except RequestError as fault:
            # What is far too long is not counted.
            if fault.code == Code.CONTEXT:
                self.used = self.context + 1
        except (ServeError, TimeoutError):
            return
        self.screen.show([])

    # The daemon comes and goes.

    async def connected(self) -> Client:
        """The client of a daemon that is there; looks for one, again and again, until there is one or Ctrl-C."""
        if self.client.is_lost:
            await self._look(say("lost"))
            self.tell("connected", what=describe(self.client, self.adapter))
        return self.client

    async def _look(self, state: str) -> None:
        delay = FIRST_DELAY
        self._show_state(state)
        while True:
            try:
                client = await self._reconnect(self._show_loading)
                break
            except NoDaemonError:
                if delay == FIRST_DELAY:
                    self.tell("looking")
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_DELAY)
        self.client.__exit__()
        self.client, self.state = client, ""

    def _show_loading(self, stage: str, done: int, total: int) -> None:
        self._show_state(f"{stage} {100 * done // total}%" if total else stage)

    def _show_state(self, state: str) -> None:
        self.state = state
        self.screen.show([])

    @property
    def origin(self) -> Origin | None:
        """How the daemon was started; None if this client may not end it, or could not start it in the same way."""
        origin = starter.origin(runtime.directory(), self.client.record)
        return origin if origin and (origin.is_child or self.may_start) else None

    async def restart(self, origin: Origin, hold: str) -> None:
        """End the daemon of this origin when its open requests are over, and start it again with another HOLD.

        Raises `ServeError` if it does not start; the next time that a daemon is needed it is started as it was.
        """
        # First: whenever Ctrl-C comes, the next question finds or starts the new one.
        self._reconnect = self._starting(origin.holding(hold))
        try:
            self._show_state(say("ending"))
            await self.client.drain()
            await starter.wait_until_gone(self.client.record)
            await self._look(say("starting"))
        except ServeError:
            self._reconnect = self._starting(origin)
            raise
        self.tell("connected", what=describe(self.client, self.adapter))

    def _starting(self, origin: Origin) -> Callable[[ShowProgress], Awaitable[Client]]:
        adapter = self.client.adapter

        async def reconnect(show: ShowProgress) -> Client:
            record = await starter.find_or_start(runtime.directory(), origin)
            try:
                return await connect(record, show, adapter)
            except EngineError:
                # It has said why it leaves; until then it would be found.
                await starter.wait_until_gone(record)
                raise

        return reconnect

    async def come_back(self, again: str) -> None:
        """After a daemon has died: find the next one, and offer to ask it; nothing is asked twice by itself."""
        await self._look(say("lost"))
        self.tell("back")
        self.screen.prefill(again)


def describe(client: Client, adapter: str) -> str:
    """`runs/x: smollm2-135m + x (adapters, bf16), 4096 tokens; also here: y, base`."""
    info, name = client.info, adapter.partition("@")[0]
    names = list(dict.fromkeys(each["name"] for each in info["adapters"]))
    others = [other for other in names if other != name]
    model = info["model"] if name == BASE else f"{info['model']} + {name}"
    here = f"; {say('also_here')}: {', '.join(others)}" if others else ""
    return f"{client.record.run}: {model} ({info['hold']}, {info['dtype']}), {info['context']} tokens{here}"
