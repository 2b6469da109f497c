"""The engine: a static key/value cache of slots over unmodified transformers modules. The one file that imports `launcher`.

A request lives in a slot (a row of the cache); rows join and leave between steps, so many answers grow together and none
waits for another. Attention is plain SDPA with a mask made from the positions. The idea is that of continuous batching
(Yu et al., Orca, OSDI 2022), with a fixed number of slots in place of paged memory.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers.cache_utils import Cache

from launcher import methods, models
from launcher.chat import prompt_ids
from launcher.errors import UserError
from launcher.reload import Progress, open_run
from serve import errors
from serve.engine import Detokenizer, EngineInfo, Sampling

NUM_SLOTS = 8
CONTEXT = 2048
# Lengths are rounded up to this, so that a step's shapes repeat.
LENGTH_BUCKET = 64


class SlotCache(Cache):
    """Keys and values of every slot: [layers, slots, heads, length, head_dim]. A forward pass writes into bound rows."""

    is_compileable = False

    def __init__(self, config: Any, num_slots: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, head_dim = heads_of(config)
        self.length = length
        shape = (config.num_hidden_layers, num_slots, heads, length, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.layers: list[Any] = []

    def seed(self, prefix: Cache) -> int:
        """Begin every slot with the keys and values of `prefix`, of batch 1; how many positions they take.

        Nothing is ever written there again: the tokens of a request come after them.
        """
        length = prefix.get_seq_length()
        for index, layer in enumerate(prefix.layers):
            self.keys[index, :, :, :length] = layer.keys
            self.values[index, :, :, :length] = layer.values
        return length

    def bind(self, rows: torch.Tensor, positions: torch.Tensor, length: int) -> None:
        """Where the next forward pass writes: `rows` int64 [B, 1], `positions` int64 [B, L]; it reads `length` back."""
        self._rows, self._positions, self._reads = rows, positions, length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, heads, L, head_dim] and return everything the rows hold: [B, heads, length, head_dim]."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._rows, :, self._positions] = key_states.transpose(1, 2).to(keys.dtype)
        values[self._rows, :, self._positions] = value_states.transpose(1, 2).to(values.dtype)
        rows = self._rows[:, 0]
        return keys[rows, :, : self._reads], values[rows, :, : self._reads]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions are given explicitly."""
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """(length of keys, offset) for the mask, which is given explicitly too."""
        return self._reads, 0


class SlotEngine:
    """Serve one finished run. See `serve.engine.Engine` for the face."""

    def __init__(self, run: Path, hold: str, dtype: str, progress: Progress) -> None:
        try:
            loaded = open_run(run, hold, dtype, progress)
        except UserError as error:
            raise errors.UserError(str(error)) from None
        self.tokenizer = loaded.tokenizer
        self.model = loaded.module
        length = min(CONTEXT, self.model.config.max_position_embeddings)
        kind = models.DTYPES[loaded.dtype]
        self._device = self.model.device
        num_slots = NUM_SLOTS
        if self._device.type == "cuda":
            num_slots = fit_slots(torch.cuda.mem_get_info(self._device)[0], slot_bytes(self.model.config, length, kind))
        self.cache = SlotCache(self.model.config, num_slots, length, kind, self._device)
        with torch.inference_mode():
            prefix = methods.prefix_cache(loaded.model, 1)
            self._num_prefix = self.cache.seed(prefix) if prefix else 0
        self.info = EngineInfo(
            model=loaded.config.model.name, adapter=run.name, hold=loaded.hold, dtype=loaded.dtype,
            context=length - self._num_prefix, num_slots=num_slots, stop_ids=loaded.stop_ids,
        )  # fmt: skip
        # Of each slot: the token that was sampled last and has not gone through the model, and its position.
        self._last = torch.zeros(num_slots, dtype=torch.long)
        self._position = torch.zeros(num_slots, dtype=torch.long)
        self._sampling = [Sampling()] * num_slots

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation up to where the assistant speaks, by the renderer that training used."""
        try:
            return prompt_ids(self.tokenizer, messages)  # type: ignore[arg-type]
        except UserError as error:
            raise ValueError(str(error)) from None

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder for one answer."""
        return StreamDecoder(self.tokenizer)

    def prefill(self, slot: int, ids: list[int], sampling: Sampling) -> int:
        """Run a prompt through the model into `slot`; its first token."""
        self._sampling[slot] = sampling
        positions = self._num_prefix + torch.arange(len(ids))[None]
        logits = self._forward(torch.tensor([ids]), [slot], positions)
        self._position[slot] = self._num_prefix + len(ids)
        self._last[slot] = token = self._sample(logits[0], slot)
        return token

    def step(self, slots: list[int]) -> list[int]:
        """One more token for each of these slots."""
        positions = self._position[slots]
        logits = self._forward(self._last[slots][:, None], slots, positions[:, None])
        self._position[slots] += 1
        tokens = [self._sample(row, slot) for row, slot in zip(logits, slots, strict=True)]
        self._last[slots] = torch.tensor(tokens)
        return tokens

    def free(self, slot: int) -> None:
        """Forget a request. Its keys stay until they are written over; the mask hides them."""
        self._position[slot] = self._num_prefix

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, slots: list[int], positions: torch.Tensor) -> torch.Tensor:
        """ids, positions int64 [B, L] -> fp32 logits [B, vocabulary] of the last position."""
        length = min(-(-(int(positions.max()) + 1) // LENGTH_BUCKET) * LENGTH_BUCKET, self.cache.length)
        positions = positions.to(self._device)
        self.cache.bind(torch.tensor(slots, device=self._device)[:, None], positions, length)
        reads = torch.arange(length, device=self._device)[None, None, :] <= positions[:, :, None]
        return self.model(
            input_ids=ids.to(self._device),
            position_ids=positions,
            attention_mask=reads[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].float()  # fmt: skip

    def _sample(self, logits: torch.Tensor, slot: int) -> int:
        """Greedy at temperature 0; else drawn with noise keyed by seed and position, so company changes nothing."""
        sampling = self._sampling[slot]
        if sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = _truncate(logits / sampling.temperature, sampling).softmax(-1).cpu()
        noise = torch.Generator().manual_seed((sampling.seed * 1_000_003 + int(self._position[slot])) % 2**63)
        return int(torch.multinomial(probabilities, 1, generator=noise))


class StreamDecoder:
    """Tokens to text as they come; a character whose bytes are not all there is held back."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer._tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        return self._stream.step(self._tokenizer, token) or ""

    def flush(self) -> str:
        """Nothing more: what is still held back is not a character."""
        return ""


def heads_of(config: Any) -> tuple[int, int]:
    """(heads of keys and values, their dimension) of a model configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def slot_bytes(config: Any, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one slot holds: 2 x layers x heads x length x head_dim x bytes a number."""
    heads, head_dim = heads_of(config)
    return 2 * config.num_hidden_layers * heads * length * head_dim * dtype.itemsize


def fit_slots(free: int, each: int) -> int:
    """How many slots go into `free` bytes of GPU memory, one at least; a quarter is left for a step's own tensors."""
    return max(1, min(NUM_SLOTS, int(free * 0.75) // each))


def _truncate(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Keep the `top_k` most likely tokens, then the fewest whose probabilities reach `top_p` (arXiv:1904.09751)."""
    if sampling.top_k:
        smallest = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(0, order, outside), float("-inf"))
    return logits
