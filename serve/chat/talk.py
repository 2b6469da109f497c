"""A conversation with a daemon: who answers, what is sent, how full the context is, and what happens when the daemon goes."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from serve.chat.answers import Outcome, Shown, collect
from serve.chat.conversation import Conversation, ending, replay
from serve.chat.conversation_events import Answer, Begin, Drop, Edit, Event, Others, Regenerate, Summary, User, Withdraw
from serve.chat.conversation_file import ConversationFile
from serve.chat.phrases import say
from serve.chat.sampling import options_of
from serve.chat.screen import Screen, prose
from serve.client import Accepted, Client, Delta, Done, Piece, ShowProgress, Waiting, connect
from serve.engine import BASE, AdapterError, AdapterInfo, resolve
from serve.errors import NoDaemonError, RequestError, ServeError, UserError
from serve.protocol import Code

# How long to wait between two looks for a daemon, from the first to the last.
FIRST_DELAY, LAST_DELAY = 0.1, 8.0
# What an answer needs at least, when turns are dropped to make room.
ROOM_TOKENS = 256


class Talk:
    """What `serve.chat.actions` act on. `reconnect` finds the daemon again after it was restarted, or raises `NoDaemonError`."""

    screen: Screen

    def __init__(
        self, client: Client, reconnect: Callable[[ShowProgress], Awaitable[Client]], file: ConversationFile
    ) -> None:
        self.client = client
        self.file = file
        self.attached: list[str] = []
        self.last: Done | None = None
        self.used = 0
        self.rate = 0.0
        self.state = ""
        self._reconnect = reconnect
        self._asking: list[Client] = []
        self._is_stopped = False
        # When the first token came, and how many there were before it.
        self._begun, self._before = 0.0, 0
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

    async def refresh(self) -> None:
        """Learn who can answer now: adapters come and go while a daemon serves."""
        client = await self.connected()
        client.info = {**client.info, "adapters": await client.adapters()}

    def require_adapter(self, name: str) -> None:
        """Raise `UserError` if nobody of that name can answer."""
        known = {field.name for field in dataclasses.fields(AdapterInfo)}
        infos = [{key: value for key, value in each.items() if key in known} for each in self.client.info["adapters"]]
        try:
            resolve(tuple(AdapterInfo(**info) for info in infos), name)
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
                self.tell_fault(fault)
        finally:
            self._action = None
            self.state = ""
            self.screen.show([])

    def interrupt(self) -> bool:
        """Ctrl-C: stop what is under way; False if nothing is."""
        self._is_stopped = True
        for client in self._asking:
            client.cancel()
        if self._action is not None and not self._asking:
            self._action.cancel()
        return self._action is not None

    def tell(self, phrase: str, **values: object) -> None:
        """Print a phrase."""
        self.screen.print(prose(say(phrase, **values)))

    def tell_fault(self, fault: ServeError) -> None:
        """Print what went wrong."""
        self.tell("error", text=fault)

    def happen(self, event: Event) -> None:
        """Let an event happen to the conversation; what the disk has against it is shown."""
        if fault := self.file.append(event):
            self.tell("error", text=fault)

    def begin(self) -> None:
        """This client goes on with the conversation from here."""
        self.happen(Begin(self.client.record.run, self.client.info["model"], self.adapter, time.time()))

    # Asking.

    async def exchange(self, event: User | Edit | Regenerate, adapters: Sequence[str] = ()) -> None:
        """Ask, of one adapter or of several, and show the answers; afterwards the turns alternate, whatever happened."""
        again = event.text if isinstance(event, User) else "/regenerate"
        names = list(adapters) or [self.adapter]
        outcomes: list[Outcome] = []
        try:
            await self.connected()
            self.happen(event)
            fault = await self._ask_until_it_fits(names, outcomes)
        finally:
            # Also where Ctrl-C ended the search for a daemon, or the choice of what to leave out.
            if self.conversation.open_question is not None:
                self._close(names, outcomes)
            if not any(outcome.texts or outcome.done for outcome in outcomes):
                self.screen.prefill(again)
        if isinstance(fault, NoDaemonError):
            await self._come_back("/regenerate" if self._has_words(outcomes) else again)

    async def _ask_until_it_fits(self, names: Sequence[str], outcomes: list[Outcome]) -> ServeError | None:
        """Put the last outcomes into `outcomes`; what went wrong has been shown."""
        while True:
            outcomes[:] = await self._ask(names)
            fault = next((outcome.fault for outcome in outcomes if outcome.fault), None)
            if fault is None or not (isinstance(fault, RequestError) and fault.code == Code.CONTEXT):
                break
            if not await self._make_room(fault.detail):
                return fault
        if fault is not None:
            self.tell_fault(fault)
        return fault

    async def _ask(self, names: Sequence[str]) -> list[Outcome]:
        """The answers of all of them, side by side."""
        self._is_stopped = False
        messages: list[dict[str, Any]] = list(self.conversation.messages())
        with contextlib.ExitStack() as more:
            clients = [self.client]
            for _ in names[1:]:
                clients.append(more.enter_context(await connect(self.client.record)))
            shown = Shown(self.screen, names if len(names) > 1 else [""])
            more.callback(self._asking.clear)
            self._asking += clients
            return list(
                await asyncio.gather(
                    *(self._ask_one(shown, i, clients[i], messages, names[i]) for i in range(len(names)))
                )
            )

    async def _ask_one(
        self, shown: Shown, number: int, client: Client, messages: list[dict[str, Any]], name: str
    ) -> Outcome:
        outcome = Outcome()
        # Ctrl-C may have come before the question is on its way.
        if not self._is_stopped:
            options = {**options_of(self.conversation.params), "adapter": name}
            outcome = await collect(client, messages, options, lambda piece: self._follow(shown, number, piece))
        is_heard = bool(outcome.texts) or outcome.fault is None
        shown.end(number, say("interrupted") if outcome.done is None and is_heard else self._cut(outcome.done))
        return outcome

    def _follow(self, shown: Shown, number: int, piece: Piece) -> None:
        if isinstance(piece, Delta):
            shown.add(number, piece)
        if number:
            return
        if isinstance(piece, Accepted):
            self.used = piece.prompt_tokens
        elif isinstance(piece, Waiting):
            is_queued = piece.stage == "queued"
            self.state = (
                say("queued", number=piece.done) if is_queued else say("reading", done=piece.done, total=piece.total)
            )
            self.screen.show([])
        elif isinstance(piece, Delta):
            if not self.state.startswith(say("answering")):
                self.state, self._begun = say("answering"), time.monotonic()
                self._before = self.used
            self.used = self._before + piece.tokens
            self.rate = (piece.tokens - 1) / max(time.monotonic() - self._begun, 1e-3)

    def _cut(self, done: Done | None) -> str:
        """A note for an answer that was ended by a limit."""
        if done is None or done.reason != "length":
            return ""
        used = done.usage["prompt_tokens"] + done.usage["completion_tokens"]
        return f"[{say('answer_full') if used >= self.context else 'max_tokens'}]"

    def _close(self, names: Sequence[str], outcomes: Sequence[Outcome]) -> None:
        """One answer ends the exchange: of who answers anyway, or the first."""
        kept = names.index(self.adapter) if self.adapter in names else 0
        outcome = outcomes[kept] if outcomes else Outcome()
        self.happen(
            ending(
                outcome.text,
                is_interrupted=outcome.done is None,
                adapter=outcome.adapter,
                usage=dict(outcome.done.usage) if outcome.done else {},
            )
        )
        others = {other.adapter or name: other.text for name, other in zip(names, outcomes, strict=False)}
        others.pop(outcome.adapter or names[kept], None)
        if others and isinstance(self.conversation.events[-1], Answer):
            self.happen(Others(others))
            self.tell("kept", name=names[kept])
        if outcome.done:
            self.last = outcome.done
            self.used = outcome.done.usage["prompt_tokens"] + outcome.done.usage["completion_tokens"]
            self.rate = outcome.done.tokens_per_second

    def _has_words(self, outcomes: Sequence[Outcome]) -> bool:
        return any(outcome.texts for outcome in outcomes) and not isinstance(self.conversation.events[-1], Withdraw)

    # The context.

    async def recount(self) -> None:
        """Have the daemon count the tokens of what stands before the next question; without one the count stays."""
        messages: list[dict[str, Any]] = [*self.conversation.messages(), {"role": "user", "content": ""}]
        try:
            self.used = (await self.client.tokenize(messages, self.adapter))["tokens"]
        except ServeError:
            return
        self.screen.show([])

    async def _make_room(self, counts: dict[str, Any]) -> bool:
        """The question does not fit: let the person choose what goes; False to leave it unasked."""
        if "have" in counts:
            self.tell("too_long", have=counts["have"], max=counts["max"])
        else:
            self.tell("far_too_long", characters=counts.get("num_characters", ""), max=self.context)
        number = await self._num_to_drop()
        if not number:
            self.tell("too_long_alone")
            return False
        self.tell("choose", number=number)
        choice = (await self.screen.choice()).strip().lower()
        if choice not in ("d", "s"):
            self.tell("not_asked")
            return False
        summary = ""
        if choice == "s":
            self.tell("your_summary")
            summary = (await self.screen.choice()).strip()
        self.happen(Drop(number))
        if summary:
            self.happen(Summary(summary))
        self.tell("dropped", number=number)
        return True

    async def _num_to_drop(self) -> int:
        """The fewest exchanges without which the question fits, and an answer; 0 if nothing helps."""
        low, high = 1, self.conversation.num_exchanges - self.conversation.num_dropped
        if high < 1 or not await self._fits_without(high):
            return 0
        while low < high:
            middle = (low + high) // 2
            if await self._fits_without(middle):
                high = middle
            else:
                low = middle + 1
        return low

    async def _fits_without(self, number: int) -> bool:
        shorter = replay([*self.conversation.events, Drop(number)])
        messages: list[dict[str, Any]] = list(shorter.messages())
        try:
            counted = await self.client.tokenize(messages, self.adapter)
        except RequestError:
            return False
        return bool(counted["tokens"] + min(ROOM_TOKENS, self.context // 4) <= counted["context"])

    # The daemon comes and goes.

    async def connected(self) -> Client:
        """The client of a daemon that is there; looks for one, again and again, until there is one or Ctrl-C."""
        if self.client.is_lost:
            await self._look()
            self.tell("connected", what=describe(self.client, self.adapter))
        return self.client

    async def _look(self) -> None:
        delay, self.state = FIRST_DELAY, say("lost")
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
        self.client = client

    def _show_loading(self, stage: str, done: int, total: int) -> None:
        self.state = f"{stage} {100 * done // total}%" if total else stage
        self.screen.show([])

    async def _come_back(self, again: str) -> None:
        """After a daemon has died: find the next one, and offer to ask it; nothing is asked twice by itself."""
        await self._look()
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
