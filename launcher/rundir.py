"""The run folder: the contract between training and serving.

run.json            the manifest: format, state, configuration, versions, base, template, stop ids, command to repeat
metrics.jsonl       one line a step
adapter/            a standard PEFT folder; tokenizer/ beside it
checkpoints/        see `checkpoint`
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from launcher.config import Config, default_run_dir
from launcher.errors import UserError
from launcher.variables import DEFAULT_MODEL, DEFAULT_PEFT

FORMAT = 3
MANIFEST = "run.json"
ADAPTER_FILE = "adapter_model.safetensors"
# A run may go on with these changed: they do not change what is learned.
FREE = (
    "batch.micro",
    "parallel.strategy",
    "parallel.timeout_s",
    "run.dir",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.every",
    "eval.examples",
    "eval.answers",
)


def logs_dir(run_dir: Path) -> Path:
    """Where the processes of a run write what they say, one file each."""
    return run_dir / "logs"


def make_folder(folder: Path) -> None:
    """Make a folder of a run; raises `UserError` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); try RUN= with a folder that can") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary name, fsync, rename: a reader sees the old file or the new one, never a part."""
    # A name of its own: where a file system has no locks two programs may write the same file at once.
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk before what comes next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(run_dir: Path, manifest: dict[str, Any]) -> None:
    """Write `run.json`."""
    write_atomically(run_dir / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


def text_digest(text: str) -> str:
    """The SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """Read `run.json`; raises `UserError` where there is none or it is not ours."""
    path = run_dir / MANIFEST
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run (no {MANIFEST}); {_runs_hint(run_dir)}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: damaged; remove {run_dir} and train again") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}; train again")
    return manifest


def read_finished(run_dir: Path) -> dict[str, Any]:
    """The manifest of a finished run; raises `UserError` otherwise."""
    manifest = read_manifest(run_dir)
    if manifest["state"] != "finished":
        raise UserError(f"{run_dir} is not finished ({manifest['state']}); finish it with: {manifest['command']}")
    return manifest


def system(manifest: dict[str, Any]) -> str:
    """The system turn that all examples of a run share, "" for none; runs of earlier versions do not tell."""
    return manifest.get("system") or ""


def require_template(manifest: dict[str, Any], template: str) -> None:
    """Raise `UserError` unless this is the chat template that was trained."""
    was = manifest["template_sha256"]
    for name, text in (("tokenizer/", template), (MANIFEST, manifest["template"])):
        if (now := text_digest(text)) != was:
            raise UserError(
                f"the chat template in {name} has changed since it was trained: its digest was {was}, is now {now}; "
                "put it back, or train again: RUN=another"
            )


def _runs_hint(run_dir: Path) -> str:
    finished = sorted(p.parent.name for p in run_dir.parent.glob(f"*/{MANIFEST}")) if run_dir.parent.is_dir() else []
    return f"try RUN={finished[0]}" if finished else "try: make train"


def check_claim(config: Config) -> bool:
    """Whether this configuration would resume an interrupted run; raises `UserError` if the folder is taken."""
    run_dir = config.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a folder; try another name: RUN={run_dir.name}-2")
    if not run_dir.exists() or all(p.name in ("lock", "logs") or p.suffix == ".part" for p in run_dir.iterdir()):
        return False
    if not (run_dir / MANIFEST).exists():
        raise UserError(f"{run_dir} exists and is not a run; try another name: RUN={run_dir.name}-2")
    manifest = read_manifest(run_dir)
    if manifest["state"] == "finished":
        raise UserError(
            f"{run_dir} holds a finished run, which is never overwritten; "
            f"try RUN={run_dir.name}-2, or start afresh with: rm -r {run_dir}"
        )
    changed = differences(manifest["config"], config.model_dump(mode="json"))
    if changed:
        raise UserError(
            f"{run_dir} was interrupted with another configuration ({'; '.join(changed)}); "
            f"resume it with: {manifest['command']}   or start another with RUN={run_dir.name}-2"
        )
    return True


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options that decide what is learned and are not the same: `optim.lr was 0.001, now 0.0002`."""
    return [
        f"{section}.{option} was {old.get(section, {}).get(option)}, now {value}"
        for section, values in new.items()
        for option, value in values.items()
        if f"{section}.{option}" not in FREE and old.get(section, {}).get(option) != value
    ]


@contextlib.contextmanager
def locked(run_dir: Path, name: str = "lock") -> Iterator[None]:
    """Hold the run folder for one training; raises `UserError` if another one writes into it. The kernel lets go."""
    lock = run_dir / name
    make_folder(lock.parent)
    with lock.open("w") as file:
        try:
            take_lock(file, is_patient=False)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another training writes here now; try another RUN=") from None
        yield


def take_lock(file: IO[str], *, is_patient: bool) -> None:
    """Lock an open file until it is closed; where another program holds it wait, or raise `BlockingIOError`.

    Some network file systems (Lustre without `flock`, NFS without its lock daemon) have no locks: a note says so.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if is_patient else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        _note_no_locks(Path(file.name).parent, error.strerror)


@functools.cache
def _note_no_locks(folder: Path, why: str) -> None:
    """Once for a folder."""
    print(f"note: {folder} has no file locks ({why}); start no two trainings in it at once", file=sys.stderr)


def make_argument(run_dir: Path) -> str:
    """How to name this run to make: nothing for the default one, else ` RUN=<name or path>`."""
    if run_dir == Path(default_run_dir(DEFAULT_MODEL, DEFAULT_PEFT)):
        return ""
    return f" RUN={shlex.quote(run_dir.name if run_dir.parent == Path('runs') else str(run_dir))}"
