"""A dataset of the hub -> its rows, with one line for whatever goes wrong on the way."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

from launcher import shapes
from launcher.config import Data
from launcher.errors import UserError
from launcher.failures import is_disk_full
from launcher.weights import TOKEN_VARIABLE, hub_token

# Seconds to wait for the hub's first answer.
PATIENCE = 10.0
NAMES = re.compile(r"\[([^\[\]]*)\]")


def rows(data: Data) -> Iterator[dict[str, Any]]:
    """The rows of a hub dataset, brought here once; raises `UserError` with one line when they cannot be had."""
    with _quiet():
        try:
            dataset = _load(data)
        except Exception as error:
            # Three libraries raise their own types here, and whatever it is, the dataset cannot be had.
            raise UserError(f"DATA={data.source}: {_explain(data, error)}") from None
    if fault := shapes.unknown_keys(dataset.column_names):
        raise UserError(f"DATA={data.source}: {fault}")
    # Only what is read is decoded: a column of pictures would need a library of its own.
    yield from dataset.select_columns([name for name in dataset.column_names if name in shapes.KEYS])


def _load(data: Data) -> Any:
    """The split as `datasets` holds it. Where the hub is out of reach, what an earlier run has brought here will do."""
    import datasets

    commit = _commit(data)
    is_offline = datasets.config.HF_HUB_OFFLINE
    # Or `datasets` tries again for half a minute.
    datasets.config.HF_HUB_OFFLINE = is_offline or not commit
    try:
        dataset = datasets.load_dataset(
            data.source, name=data.subset, split=data.split, revision=commit or data.revision, token=hub_token()
        )
    finally:
        datasets.config.HF_HUB_OFFLINE = is_offline
    # Without the hub it takes whichever revision is here.
    if data.revision and not any((commit or data.revision) in file["filename"] for file in dataset.cache_files):
        raise ConnectionError
    return dataset


def _commit(data: Data) -> str | None:
    """The commit that `data.revision` stands for, None if the hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        return HfApi(token=hub_token()).dataset_info(data.source, revision=data.revision, timeout=PATIENCE).sha
    except Exception as error:
        if isinstance(error, ValueError) or 400 <= _status(error) < 500:
            raise
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars, notices and warnings off the user's screen."""
    import datasets
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    had_bars, disabled = not are_progress_bars_disabled(), logging.root.manager.disable
    datasets.disable_progress_bars()
    disable_progress_bars()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if had_bars:
            enable_progress_bars()


def _explain(data: Data, error: Exception) -> str:
    """What went wrong, by its type or else by the libraries' words; ends with what to try."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError
    from huggingface_hub import constants, errors

    page = f"huggingface.co/datasets/{data.source}"
    if fault := _unknown_name(data, str(error)):
        return fault
    if isinstance(error, errors.GatedRepoError) or "is a gated dataset" in str(error):
        return f"it is gated; accept its terms on {page}, then: export {TOKEN_VARIABLE}=..."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {data.revision}; try data.revision=main"
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "it may be private" if hub_token() else f"if it is private, export {TOKEN_VARIABLE}=..."
        return f"no such file or folder here and no such dataset on the hub ({hint}); check its name, or try DATA=cafe"
    if isinstance(error, errors.HFValidationError):
        return "not a hub id; it is written org/name"
    if _status(error) in (401, 403):
        return f"the hub rejects this token; renew it and export {TOKEN_VARIABLE}=..."
    if isinstance(error, DataFilesNotFoundError):
        return f"no data files in it; look at {page}, or try DATA=cafe"
    if isinstance(error, DatasetGenerationError):
        why = _first_line(error.__cause__ or error)
        return f"its files cannot be read ({why}); look at {page}, or try another data.split or data.subset"
    if is_disk_full(error):
        return "the disk is full; free some space and try again"
    if isinstance(error, ConnectionError):
        what = f"{f'revision {data.revision}' if data.revision else 'it'} is not on this machine"
        if constants.HF_HUB_OFFLINE:
            return f"{what} and HF_HUB_OFFLINE is set; unset it, or try DATA=cafe, which needs no network"
        return f"{what} and the hub cannot be reached; check the network, or try DATA=cafe, which needs none"
    return f"cannot be loaded ({_first_line(error)}); look at {page}, or try DATA=cafe"


def _unknown_name(data: Data, says: str) -> str | None:
    """What is wrong with the subset or the split, with the names that there are; `datasets` has no types for these."""
    found = NAMES.search(says)
    names = [name.strip("' ") for name in found[1].split(",")] if found else []
    listed = ", ".join(names)
    if says.startswith("BuilderConfig"):
        return f"no subset {data.subset}; try data.subset={names[0]}, the subsets are: {listed}"
    if says.startswith("Config name is missing"):
        return f"it has several subsets; try data.subset={names[0]}, the subsets are: {listed}"
    if says.startswith("Unknown split"):
        return f"no split {data.split}; try data.split={names[0]}, the splits are: {listed}"
    if says.startswith("Unrecognized instruction"):
        return f"data.split={data.split} is no split; try data.split=train"
    return None


def _status(error: Exception) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
