"""The engine: rows of keys and values over unmodified transformers modules, many answers growing together.

Requests join and leave between steps, so none waits for another: continuous batching (Yu et al., Orca, OSDI 2022), with a
fixed number of rows in place of paged memory. Attention is plain SDPA with a mask made from the positions.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from serve.cache import SlotCache, row_bytes
from serve.engine import AdapterError, AdapterInfo, Detokenizer, EngineInfo, Read, Sampling
from serve.errors import UserError
from serve.graphs import Graphs, length_bucket, record_cuda, row_bucket
from serve.held import Held, Progress, hold_runs
from serve.layers import BASE_INDEX, Batch
from serve.load import Load
from serve.rows import Rows
from serve.sampler import Sampler
from serve.settings import Settings
from serve.shelf import Loaded, Shelf
from serve.sizes import fit, free_for_rows, layer_devices
from serve.stream import StreamDecoder

# What is sensible where nothing was asked for: (rows, tokens of a chunk) by the kind of device.
DEFAULTS = {"cuda": (64, 512), "cpu": (16, 256)}
CONTEXT = 4096
# Lengths are rounded up to this, so that the shapes of steps repeat.
LENGTH_BUCKET = 64


@dataclass
class Seat:
    """A request in the engine: its prompt, and the token that was chosen last and has not gone through the model."""

    ids: list[int]
    adapter: Loaded
    done: int
    last: int = field(default=-1)


class SlotEngine:
    """Serve what is held. See `serve.engine.Engine` for the face."""

    def __init__(self, held: Held, settings: Settings) -> None:
        self._held = held
        self.model = held.model
        self._decoder, head = self.model.base_model, self.model.get_output_embeddings()
        self._head_device: torch.device = head.weight.device
        self._device: torch.device = self.model.device
        self._batch = Batch()
        devices = layer_devices(self.model)
        is_spread = len(set(devices)) > 1
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        rows, chunk = DEFAULTS[self._device.type]
        length = min(settings.context or CONTEXT, self.model.config.max_position_embeddings)
        number, length = fit(
            free_for_rows(devices, settings.memory), lambda n: row_bytes(self.model.config, n, dtype),
            settings.slots or rows, length,
        )  # fmt: skip
        self.cache = SlotCache(self.model.config, number, length, dtype, devices)
        self._graphs = Graphs(record_cuda if self._device.type == "cuda" and not is_spread else None)
        self._shelf = Shelf(held, self._batch, length)
        self._head = self._batch.products.quicker(head)
        self._rows = Rows(number, self.cache, self._shelf.head_length)
        self._sampler = Sampler(number, head.weight.shape[0], self._device)
        self._seats: dict[int, Seat] = {}
        self.info = EngineInfo(
            model=held.name, base=held.base, hold=held.hold, dtype=held.dtype,
            devices=tuple(dict.fromkeys(map(str, devices))), context=length, num_slots=number,
            chunk=settings.chunk or chunk, stop_ids=held.stop_ids, adapters=(), merge_kl=held.merge_kl, notes=held.notes,
        )  # fmt: skip
        self._reserving = self._reserve()
        self._tell()

    # The face.

    def prompt_ids(self, messages: list[dict], context: int | None = None) -> list[int]:
        """The ids of a conversation up to where the assistant speaks, by the renderer that training used."""
        return self._held.prompt_ids(messages, context)

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder for one answer."""
        return StreamDecoder(self._held.tokenizer)

    def start(self, slot: int, ids: list[int], sampling: Sampling, adapter: str) -> int:
        """Find a row that has the beginning of the prompt already, or a free one."""
        loaded = self._shelf[adapter]
        reused = self._rows.start(slot, adapter, ids)
        try:
            if loaded.prefix is not None and not reused:
                self.cache.seed(self._rows.row_of(slot), loaded.prefix)
            self._sampler.start(slot, ids, sampling)
        except BaseException:
            self._sampler.free(slot)
            self._rows.free(slot)
            raise
        self._seats[slot] = Seat(ids, loaded, reused)
        return reused

    def prefill(self, slots: list[int], chunk: int = 0) -> list[Read]:
        """Read a chunk of these prompts in one pass, padded to the longest."""
        seats = [self._seats[slot] for slot in slots]
        size = max(1, (chunk or self.info.chunk) // len(slots))
        pieces = [seat.ids[seat.done : seat.done + size] for seat in seats]
        longest = max(map(len, pieces))
        ids = torch.tensor([piece + [0] * (longest - len(piece)) for piece in pieces])
        starts = [seat.adapter.num_prefix + seat.done for seat in seats]
        ends = [start + len(piece) for start, piece in zip(starts, pieces, strict=True)]
        # Padding is written where nobody reads.
        places = torch.tensor(starts)[:, None] + torch.arange(longest)
        positions = places.masked_fill(places >= torch.tensor(ends)[:, None], self.cache.length)
        rows, reads = [self._rows.row_of(slot) for slot in slots], self._reads(max(ends))
        where = slice(rows[0], rows[0] + 1) if len(rows) == 1 else torch.tensor(rows, device=self._device)
        whole = [i for i, s in enumerate(seats) if s.done + len(pieces[i]) == len(s.ids)]
        last = [(i, len(pieces[i]) - 1) for i in whole]
        indices = torch.tensor([seat.adapter.index for seat in seats])
        logits = self._forward(ids, positions, where, reads, indices, _only(seats), last)
        return self._finish_reading(slots, pieces, whole, logits)

    def _finish_reading(
        self, slots: list[int], pieces: list[list[int]], whole: list[int], logits: torch.Tensor
    ) -> list[Read]:
        for slot, piece in zip(slots, pieces, strict=True):
            self._rows.rows[self._rows.row_of(slot)].tokens.extend(piece)
            self._seats[slot].done += len(piece)
        first: dict[int, int] = {}
        if whole:
            ready = [slots[i] for i in whole]
            plan = self._sampler.plan(ready, [len(self._seats[slot].ids) for slot in ready])
            chosen = self._sampler.choose(logits, plan)
            first = dict(zip(ready, chosen, strict=True))
            for slot, token in first.items():
                self._seats[slot].last = token
                self._rows.answer(slot)
        return [Read(slot, self._seats[slot].done, len(self._seats[slot].ids), first.get(slot)) for slot in slots]

    def step(self) -> dict[int, int]:
        """One more token for each answering row, in one pass."""
        slots = self._rows.answering
        seats = [self._seats[slot] for slot in slots]
        written = [len(self._rows.rows[row].tokens) for row in range(len(slots))]
        positions = [seat.adapter.num_prefix + n for seat, n in zip(seats, written, strict=True)]
        size, reads = self._shape(len(slots), max(positions) + 1)
        only = _only(seats)
        columns = [[s.last, p, s.adapter.index] for s, p in zip(seats, positions, strict=True)]
        columns += [[0, self.cache.length, BASE_INDEX]] * (size - len(slots))

        def run(inputs: torch.Tensor) -> torch.Tensor:
            ids, places, indices = inputs
            everything = [(i, 0) for i in range(size)]
            return self._forward(ids[:, None], places[:, None], slice(0, size), reads, indices, only, everything)

        plan = self._sampler.plan(slots, [n + 1 for n in written])
        inputs = torch.tensor(columns).t().contiguous().to(self._device)
        logits = self._graphs.run((size, reads, only), run, inputs)[: len(slots)]
        tokens = self._sampler.choose(logits, plan)
        for row, (seat, token) in enumerate(zip(seats, tokens, strict=True)):
            self._rows.rows[row].tokens.append(seat.last)
            seat.last = token
        if self._graphs.state != self.info.graphs:
            self.info = replace(self.info, graphs=self._graphs.state)
        return dict(zip(slots, tokens, strict=True))

    def free(self, slot: int) -> None:
        """Forget a request; its row keeps what it has read."""
        seat = self._seats.pop(slot)
        row = self._rows.row_of(slot)
        self._sampler.free(slot)
        if not self._is_sound(seat, row):
            # Its numbers went wrong, and they lie in the cache.
            self._rows.rows[row].tokens = []
            self.cache.wipe(row)
        self._rows.free(slot)

    def _is_sound(self, seat: Seat, row: int) -> bool:
        """Whether a row holds numbers: known of one that is answering, looked up in one whose prompt was not read to its end."""
        if seat.done == len(seat.ids):
            return seat.last >= 0
        return self.cache.is_finite(row, seat.adapter.num_prefix + seat.done)

    def reserve(self) -> bool:
        """One layer of one row; a GPU's memory is there already."""
        return next(self._reserving, False)

    def _reserve(self) -> Iterator[bool]:
        if self._device.type == "cpu":
            for row, layer in itertools.product(range(len(self._rows.rows)), range(len(self.cache.keys))):
                if not self._rows.rows[row].tokens:
                    self.cache.reserve(row, layer)
                    yield True

    def load_adapter(self, run: str) -> AdapterInfo:
        """Serve one more run: everything of it must fit this base, and it must change what the base says."""
        try:
            return self._shelf.load(run)
        finally:
            # One that is refused has been among the layers, too.
            self._tell()

    def unload_adapter(self, key: str) -> None:
        """Forget an adapter that no slot uses, and all that its rows have read."""
        self._rows.forget(key)
        self._shelf.unload(key)
        self._tell()

    def _tell(self) -> None:
        """The adapters have changed."""
        self.info = replace(self.info, adapters=self._shelf.infos)
        self._graphs.forget()

    # The model.

    def _shape(self, number: int, length: int) -> tuple[int, int]:
        """How many rows a step computes, and how many positions of each it reads: few shapes where they are recorded."""
        if not self._graphs.is_on:
            return number, self._reads(length)
        return row_bucket(number, self.info.num_slots), length_bucket(length, self.cache.length)

    def _reads(self, length: int) -> int:
        return min(-(-length // LENGTH_BUCKET) * LENGTH_BUCKET, self.cache.length)

    @torch.inference_mode()
    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: slice | torch.Tensor,
        reads: int,
        indices: torch.Tensor,
        only: int | None,
        last: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """ids, positions int64 [B, L], adapter indices [B] -> fp32 logits [len(last), vocabulary] after `last` (b, l)."""
        positions = positions.to(self._device)
        self.cache.bind(rows, positions, reads)
        self._batch.bind(indices.to(self._device), only)
        hidden_places = torch.arange(reads, device=self._device)[None, None, :] > positions[:, :, None]
        # As numbers: from booleans every layer would make them anew.
        mask = torch.zeros(hidden_places.shape, dtype=self.cache.keys[0].dtype, device=self._device)
        mask.masked_fill_(hidden_places, float("-inf"))
        hidden = self._decoder(
            input_ids=ids.to(self._device),
            # The place for padding is one behind those that the model knows.
            position_ids=positions.clamp(max=self.cache.length - 1),
            attention_mask=mask[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )[0]
        if len(last) == hidden.shape[0] and hidden.shape[1] == 1:
            hidden = hidden[:, 0]
        elif last:
            hidden = torch.stack([hidden[b, position] for b, position in last])
        else:
            return hidden.new_zeros(0, 0)
        return self._head(hidden.to(self._head_device)).float().to(self._device)


def open_engine(load: Load, progress: Progress) -> SlotEngine:
    """An engine that serves these finished runs; raises `serve.errors.UserError`."""
    held = hold_runs(load, progress)
    engine = SlotEngine(held, load.settings)
    if held.hold != "merged":
        for number, run in enumerate(load.runs):
            progress(f"loading the adapter {Path(run).name}", number, len(load.runs))
            try:
                engine.load_adapter(run)
            except AdapterError as fault:
                raise UserError(str(fault)) from None
    return engine


def _only(seats: Sequence[Seat]) -> int | None:
    """The adapter of all of them, None if there are several."""
    indices = {seat.adapter.index for seat in seats}
    return indices.pop() if len(indices) == 1 else None
