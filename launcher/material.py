"""What is learned, ready before any process joins another: conversations and their tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launcher import models
from launcher.chat import stop_ids
from launcher.config import Config
from launcher.data import Splits
from launcher.encoding import Examples, count_trained, encode_splits
from launcher.errors import UserError


@dataclass(frozen=True)
class Material:
    """The data of a run: as conversations and as tokens, of at most `longest` each."""

    splits: Splits
    tokenizer: Any
    train: Examples
    held_out: Examples
    stop_ids: tuple[int, ...]
    longest: int

    @property
    def num_stopping(self) -> int:
        """Training examples in which a stop token is learned."""
        is_stop = np.isin(self.train.ids, self.stop_ids) & self.train.trained
        return int(np.logical_or.reduceat(is_stop, self.train.starts).sum())


def load_material(config: Config, splits: Splits, folder: Path, context: int, template: str | None = None) -> Material:
    """Tokenise with the tokenizer in `folder`, and `template` or its own, for a model that reads `context` tokens.

    Raises `UserError` for what could teach nothing, or never to stop."""
    tokenizer = models.load_tokenizer(folder, template)
    prefix = config.adapter.num_tokens if config.adapter.method == "prefix" else 0
    longest = min(config.data.max_length, context - prefix)
    train, held_out = encode_splits(tokenizer, folder, splits, config.data, longest)
    material = Material(splits, tokenizer, train, held_out, tuple(stop_ids(tokenizer)), longest)
    if not count_trained(train):
        raise UserError("no token of these examples would be trained; try a larger data.max_length, or other data")
    if not material.num_stopping:
        stop = tokenizer.convert_ids_to_tokens(material.stop_ids[0])
        raise UserError(
            f"the stop token {stop} is never learned, every answer is cut before its end at {longest} tokens, so the "
            "model would never stop; try a larger data.max_length, or data.overflow=drop"
        )
    return material
