"""Requests served by one engine: they join and leave between steps.

A turn gives waiting requests the free slots, reads one chunk of the prompts that are not read yet, and gives every answer one
more token: a long prompt delays the others by one chunk at most.
"""

import dataclasses
import time
import traceback
from collections.abc import Callable
from typing import Any

from serve import submission
from serve.engine import BASE, AdapterError, AdapterInfo, Engine, Sampling, TooLongError, resolve
from serve.faults import engine_code, first_line
from serve.pace import Pace, num_read_together
from serve.protocol import NO_REQUEST, Code, Kind, Message, ProtocolError, error
from serve.slots import Request, SlotTable
from serve.submission import Submission

# So many steps in a row that fail: the device, not a request, is broken.
MAX_FAILURES = 3
SHORTER = "try /reset or a shorter text"


class Worker:
    """Serves requests with one engine. What it says to the daemon goes through `send`, and out at the latest with `flush`."""

    def __init__(
        self, engine: Engine, send: Callable[[Message], None], flush: Callable[[], None] = lambda: None
    ) -> None:
        self.engine = engine
        self.table = SlotTable(engine.info.num_slots)
        self._send, self._flush = send, flush
        self._pace = Pace(engine.info.chunk)
        self._failures = 0
        # What the daemon knows of the engine.
        self._told = engine.info

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do until a message comes."""
        return not self.table.occupied and not self.table.waiting

    def receive(self, message: Message) -> None:
        """Take a message of the daemon's; whatever is wrong with it is answered with an ERROR."""
        handlers = {
            Kind.SUBMIT: self._queue,
            Kind.CANCEL: self._cancel,
            Kind.TOKENIZE: self._tokenize,
            Kind.LOAD: self._load,
            Kind.UNLOAD: self._unload,
        }
        try:
            handlers[message.kind](message)
        except ProtocolError as fault:
            self._send(error(message.request, fault.code, str(fault), **fault.detail))
        except AdapterError as fault:
            code = Code.ADAPTER_INCOMPATIBLE if message.kind is Kind.LOAD else Code.NO_ADAPTER
            self._send(error(message.request, code, str(fault)))
        except ValueError as fault:
            self._send(error(message.request, Code.BAD_REQUEST, first_line(fault)))
        except Exception as fault:
            traceback.print_exc()
            self._send(error(message.request, engine_code(fault), first_line(fault)))
        self._flush()

    def turn(self) -> None:
        """Fill the free slots, read one chunk, then one token for everybody."""
        while admitted := self.table.admit():
            self._start(*admitted)
        if self.table.reading:
            self._read()
            # The first words of an answer do not wait for the next ones of the others.
            self._flush()
        if len(self.table.occupied) > len(self.table.reading):
            self._step()
        self._retire()
        if self.engine.info is not self._told:
            self._tell(NO_REQUEST)
        self._flush()

    # Messages.

    def _queue(self, message: Message) -> None:
        asked = submission.parse(message.body, message.request)
        adapter = resolve(self.engine.info.adapters, asked.adapter)
        ids = self._prompt_ids(asked, adapter, message.request)
        if len(ids) >= adapter.context:
            text = f"the conversation is {len(ids)} tokens and the model holds {adapter.context}; {SHORTER}"
            counts = {"have": len(ids), "need": len(ids) + 1, "max": adapter.context}
            raise ProtocolError(Code.CONTEXT, text, message.request, **counts)
        client = message.body.get("client", 0)
        request = Request(message.request, client, ids, asked, adapter, self.engine.detokenizer())
        self.table.add(request)
        body = {"prompt_tokens": len(ids), "adapter": adapter.key, "max_tokens": request.limit}
        self._send(Message(Kind.ACCEPTED, request.id, body))

    def _prompt_ids(self, asked: Submission, adapter: AdapterInfo, request: bytes) -> list[int]:
        try:
            return self.engine.prompt_ids(adapter.as_trained(asked.messages), adapter.context)
        except TooLongError:
            number = sum(len(turn["content"]) for turn in asked.messages)
            text = f"the conversation is {number} characters, more than {adapter.context} tokens can be (not counted)"
            counts = {"num_characters": number, "max": adapter.context}
            raise ProtocolError(Code.CONTEXT, f"{text}; {SHORTER}", request, **counts) from None

    def _cancel(self, message: Message) -> None:
        """Answered whether or not the request is here: it may not have been read yet, or have ended just now."""
        slot, tokens = self.table.find(message.request), 0
        if slot is not None:
            tokens = self.table.occupied[slot].generated
            self._free(slot)
        else:
            self.table.withdraw(message.request)
        self._send(error(message.request, Code.CANCELLED, "cancelled", tokens=tokens))

    def _tokenize(self, message: Message) -> None:
        asked = submission.parse(message.body, message.request)
        adapter = resolve(self.engine.info.adapters, asked.adapter)
        tokens = len(self._prompt_ids(asked, adapter, message.request))
        body = {"tokens": tokens, "context": adapter.context, "adapter": adapter.key}
        self._send(Message(Kind.TOKENIZE, message.request, body))

    def _load(self, message: Message) -> None:
        adapter = self.engine.load_adapter(message.body["run"])
        self._retire()
        self._tell(message.request, loaded=adapter.key)

    def _unload(self, message: Message) -> None:
        adapter = resolve(self.engine.info.adapters, message.body["adapter"])
        if self.table.uses(adapter.key):
            raise AdapterError(f"{adapter.key} is answering; try again when its requests are over")
        self.engine.unload_adapter(adapter.key)
        self._tell(message.request, unloaded=adapter.key)

    def _tell(self, request: bytes, **what: Any) -> None:
        """Send what is loaded now; in the engine's own log stands what became of its CUDA graphs."""
        info = self.engine.info
        if info.graphs != self._told.graphs:
            print(f"CUDA graphs: {info.graphs}", flush=True)
        self._told = info
        self._send(Message(Kind.ADAPTERS, request, {"info": dataclasses.asdict(info), **what}))

    # Turns.

    def _start(self, slot: int, request: Request) -> None:
        try:
            request.reused = self.engine.start(slot, request.ids, request.asked.sampling, request.adapter.key)
        except Exception as fault:
            self._fail([slot], fault, is_started=False)
            self._require_device(slot, request, fault)
            return
        self.table.reading[slot] -= request.reused
        self._tell_read(request, request.reused, len(request.ids))

    def _read(self) -> None:
        slots, left = list(self.table.reading), list(self.table.reading.values())
        chunk = self._pace.chunk(num_answering=len(self.table.occupied) - len(slots))
        slots = slots[: num_read_together(left, chunk)]
        begun = time.monotonic()
        try:
            reads = self.engine.prefill(slots, chunk)
        except Exception as fault:
            # These prompts were too much for the engine; the other slots are untouched.
            request = self.table.occupied[slots[0]]
            self._fail(slots, fault)
            self._require_device(slots[0], request, fault)
            return
        self._pace.took(
            sum(left[: len(slots)]) - sum(read.total - read.done for read in reads), time.monotonic() - begun
        )
        for read in reads:
            request = self.table.occupied[read.slot]
            if read.token is None:
                self.table.reading[read.slot] = read.total - read.done
                self._tell_read(request, read.done, read.total)
            else:
                del self.table.reading[read.slot]
                request.answering = time.monotonic()
                self._emit(read.slot, read.token)

    def _tell_read(self, request: Request, done: int, total: int) -> None:
        self._send(Message(Kind.PROGRESS, request.id, {"stage": "prompt", "done": done, "total": total}))

    def _step(self) -> None:
        answering = [slot for slot in self.table.occupied if slot not in self.table.reading]
        try:
            tokens = self.engine.step()
        except Exception as fault:
            self._failures += 1
            # Memory may suffice for one request less.
            self._fail(answering[-1:] if engine_code(fault) is Code.OOM else answering, fault)
            if self._failures >= MAX_FAILURES:
                raise
            return
        self._failures = 0
        for slot, token in tokens.items():
            self._emit(slot, token)

    def _emit(self, slot: int, token: int) -> None:
        request = self.table.occupied[slot]
        if token < 0:
            self._fail([slot], ArithmeticError("the model's logits were not numbers; try another adapter"))
            return
        text, reason = request.take(token, self.engine.info.stop_ids)
        if text or request.asked.wants_ids:
            ids = {"ids": [token]} if request.asked.wants_ids else {}
            self._send(Message(Kind.DELTA, request.id, {"text": text, "tokens": request.generated, **ids}))
        if reason is not None:
            self._free(slot)
            body = {"reason": reason, "stop": request.stop, "usage": request.usage(), "timings": request.timings()}
            self._send(Message(Kind.DONE, request.id, body))

    def _fail(self, slots: list[int], fault: Exception, *, is_started: bool = True) -> None:
        traceback.print_exception(fault)
        for slot in slots:
            request = self.table.occupied[slot]
            if is_started:
                self._free(slot)
            else:
                self.table.release(slot)
            self._send(error(request.id, engine_code(fault), first_line(fault)))

    def _require_device(self, slot: int, request: Request, fault: Exception) -> None:
        """Raise `fault` if not even one token can be read in this free slot: then the device, not the request, is broken."""
        if engine_code(fault) is Code.OOM:
            return
        try:
            self.engine.start(slot, request.ids[:1], Sampling(), self.engine.info.adapters[-1].key)
            self.engine.prefill([slot])
            self.engine.free(slot)
        except Exception:
            raise fault from None

    def _free(self, slot: int) -> None:
        self.engine.free(slot)
        self.table.release(slot)

    def _retire(self) -> None:
        """Unload what a newer adapter of the same name has replaced, once nobody is answered by it."""
        newest = {adapter.name: adapter.key for adapter in self.engine.info.adapters}
        for adapter in self.engine.info.adapters:
            is_old = adapter.key not in (BASE, newest[adapter.name])
            if is_old and not self.table.uses(adapter.key):
                self.engine.unload_adapter(adapter.key)
                self._tell(NO_REQUEST, unloaded=adapter.key)
