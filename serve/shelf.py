"""The adapters that an engine serves, and the layers of the base that they change."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from serve import adapters
from serve.adapters import Adapter
from serve.engine import BASE, AdapterError, AdapterInfo
from serve.held import Held, file_digest, kl, probe
from serve.layers import BASE_INDEX, AdaptedLinear, Batch, Part

# An adapter that moves the next token by less changes nothing; adding zeros moves it by exactly nothing.
LEAST_KL = 1e-9


@dataclass
class Loaded:
    """An adapter that is served: `index` is its number in the layers."""

    info: AdapterInfo
    index: int
    prefix: torch.Tensor | None = None

    @property
    def num_prefix(self) -> int:
        """How many positions the prefix takes at the head of a row."""
        return 0 if self.prefix is None else self.prefix.shape[3]


class Shelf:
    """What answers: the base, or the model with its only adapter merged, and what was loaded beside it."""

    def __init__(self, held: Held, batch: Batch, length: int) -> None:
        self._held, self._batch, self._length = held, batch, length
        self._model = held.model
        self._device: torch.device = self._model.device
        self._bases: dict[str, nn.Module] = dict(adapters.layers_of(self._model))
        if self._device.type == "cpu":
            batch.products.measure(self._bases.values())
        self._layers = self._adapt_layers()
        self._loaded: dict[str, Loaded] = {}
        self._names: list[str] = []
        self._untuned: torch.Tensor | None = None
        self._put(Loaded(_own_info(held, length), BASE_INDEX))

    def __getitem__(self, key: str) -> Loaded:
        """The adapter of that key."""
        return self._loaded[key]

    @property
    def infos(self) -> tuple[AdapterInfo, ...]:
        """Names in the order in which they first came, of one name the newest last, the base behind them all."""
        ordered = sorted(
            self._loaded.values(),
            key=lambda loaded: (loaded.info.name == BASE, self._names.index(loaded.info.name)),
        )
        return tuple(loaded.info for loaded in ordered)

    def head_length(self, key: str) -> int:
        """How many positions the prefix of an adapter takes at the head of a row; 0 for one that is gone."""
        return self._loaded[key].num_prefix if key in self._loaded else 0

    def load(self, run: str) -> AdapterInfo:
        """Serve one more run: everything of it must fit this base, and it must change what the base says."""
        if self._held.hold == "merged":
            raise AdapterError("the daemon holds a merged model, which takes no adapter; try: make serve HOLD=adapters")
        begun, name = time.monotonic(), Path(run).name
        if name == BASE:
            raise AdapterError(f"{run}: {BASE} means the model without an adapter; try to rename the folder")
        try:
            adapter = self._held.read_adapter(Path(run), self._bases)
        except OSError as fault:
            raise AdapterError(f"{run}: {fault.strerror}; try another run") from None
        context = self._length - adapter.num_prefix
        info = AdapterInfo(
            name,
            adapter.digest,
            adapter.method,
            context,
            adapter.matched,
            adapter.total,
            run=str(run),
            system=adapter.system,
        )
        if info.key in self._loaded:
            # Loaded again it is the newest of its name.
            self._put(self._loaded.pop(info.key))
            return self._loaded[info.key].info
        if context < 2:
            raise AdapterError(f"{run}: its prefix leaves no room; try serve.context={2 * adapter.num_prefix}")
        used = {loaded.index for loaded in self._loaded.values()}
        index = next(i for i in range(1, len(used) + 2) if i not in used)
        prefix = None if adapter.prefix is None else adapter.prefix.to(self._device)
        self._put_parts(index, adapter)
        try:
            divergence = kl(self._probe(index, prefix), self._probe_base())
            if not LEAST_KL < divergence < float("inf"):
                raise AdapterError(f"{run} answers exactly like its base (KL {divergence:.1g}); train it again")
        except BaseException:
            self._drop_parts(index)
            raise
        loaded = Loaded(replace(info, kl=divergence, load_s=round(time.monotonic() - begun, 3)), index, prefix)
        self._put(loaded)
        return loaded.info

    def unload(self, key: str) -> None:
        """Forget an adapter; raises `AdapterError` for one that is not there or is part of the base."""
        loaded = self._loaded.get(key)
        if loaded is None or loaded.index == BASE_INDEX:
            raise AdapterError(f"{key} cannot be unloaded; choose another adapter")
        self._drop_parts(loaded.index)
        del self._loaded[key]

    def _put(self, loaded: Loaded) -> None:
        self._loaded[loaded.info.key] = loaded
        if loaded.info.name not in self._names:
            self._names.append(loaded.info.name)

    def _put_parts(self, index: int, adapter: Adapter) -> None:
        for name, layer in self._layers.items():
            layer.put(index, adapter.parts.get(name, Part()))

    def _drop_parts(self, index: int) -> None:
        for layer in self._layers.values():
            layer.drop(index)

    def _probe_base(self) -> torch.Tensor:
        if self._untuned is None:
            self._untuned = self._probe(BASE_INDEX, None)
        return self._untuned

    def _probe(self, index: int, prefix: torch.Tensor | None) -> torch.Tensor:
        """See `held.probe`; away from the rows."""
        self._batch.bind(torch.tensor([index], device=self._device), index)
        return probe(self._held, self._model, prefix)

    def _adapt_layers(self) -> dict[str, AdaptedLinear]:
        """Have the layers multiply in the quicker way, and put `AdaptedLinear` around those that adapters may change."""
        adapted = {}
        for name, layer in self._bases.items():
            quicker = self._bases[name] = self._batch.products.quicker(layer)
            if self._held.hold != "merged":
                adapted[name] = AdaptedLinear(quicker, self._batch)
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, adapted.get(name, quicker))
        return adapted


def _own_info(held: Held, length: int) -> AdapterInfo:
    """The base, or the run that was merged into it."""
    run = held.merged
    if run is None:
        return AdapterInfo(BASE, "", "none", length)
    return AdapterInfo(run.name, file_digest(run), "merged", length, kl=held.tuned_kl, run=str(run), system=held.system)
