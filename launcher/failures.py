"""Failures that a person can read: what each process leaves when it fails, and the one block that is made of it.

`logs/rank-<n>.failure.json` is written by the process that fails; `supervise` reads those of all processes and shows the
first. Free of torch.
"""

import contextlib
import errno
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from launcher.beat import Beat, FreshFiles
from launcher.errors import EXIT_OURS, EXIT_STOPPED, EXIT_USAGE, IntegrityError, UserError

# Set by `supervise`, which then does the talking: how often it has started the processes before.
ATTEMPT = "AFINAR_ATTEMPT"
Kind = Literal["stopped", "user", "integrity", "memory", "error"]


@dataclass(frozen=True)
class Failure:
    """How one process ended. `kind` stopped is no failure: it was told to. `time` is the wall clock, in seconds."""

    rank: int
    host: str
    kind: Kind
    doing: str
    message: str
    time: float = 0.0
    attempt: int = 0

    @property
    def is_echo(self) -> bool:
        """Whether it only tells that another process has gone."""
        return self.kind == "error" and bool(ECHO.search(self.message))


# What the communication libraries say when the process at the other end is no more.
ECHO = re.compile(
    r"closed by peer|connection reset|broken pipe|socket closed|remote process exited|timed out|"
    r"remote worker|caused pair closure|collective operation timeout|ncclRemoteError|ncclSystemError|connection refused|"
    r"store.*(get|wait)|recvValue failed",
    re.IGNORECASE,
)
NO_MEMORY = r"out of memory|can't allocate memory|bad_alloc|MemoryError"
NO_SPACE = r"no space left|os error 28|disk quota"
NO_SHARED_MEMORY = r"/dev/shm/nccl"
# (what the message holds, the likely cause, what to try); the first that fits.
CAUSES = (
    (
        NO_MEMORY,
        "the GPU, or the machine, has no memory left",
        "a smaller batch.micro, model.gradient_checkpointing=true, a shorter data.max_length, STRATEGY=zero3, or PEFT=qlora",
    ),
    (
        r"address already in use|EADDRINUSE",
        "another program holds the port that the processes meet at",
        "the same command again, or MASTER_PORT= with another number on several machines",
    ),
    (
        r"gated|401 Client Error|403 Client Error|HUGGINGFACE_TOKEN",
        "the hub wants a token that may read this model",
        "export HUGGINGFACE_TOKEN=..., and accept the model's licence on its page",
    ),
    (
        NO_SHARED_MEMORY,
        "the GPUs talk through shared memory, and this container has too little",
        "docker run --ipc=host as `make shell` does, or a memory volume at /dev/shm as in configs/cluster/kubernetes.yaml",
    ),
    (
        NO_SPACE,
        "the disk is full",
        "freeing some space, then the same command again",
    ),
    (
        r"nccl",
        "the GPUs cannot talk to each other",
        "NCCL_DEBUG=INFO and the same command, and look into the logs; NCCL_P2P_DISABLE=1 where GPUs share no bus; "
        "NCCL_SOCKET_IFNAME= with the right network on several machines",
    ),
    (
        r"timed out|closed by peer|connection reset|connection refused|remote worker",
        "a process did not answer, on this machine or another",
        "the logs of the other machines; with NNODES, that all were started with the same MASTER_ADDR and MASTER_PORT",
    ),
    (r"SIGKILL", "the system ended the process, most often because the machine ran out of memory", "fewer processes or a smaller model; `dmesg` says more"),
    (r"SIGSEGV|SIGABRT|SIGBUS", "native code crashed", "the same command again; if it crashes again, the versions in requirements.lock"),
)  # fmt: skip


def explain(message: str) -> tuple[str, str] | None:
    """(likely cause, what to try) for a message; None where nothing is known."""
    for pattern, cause, remedy in CAUSES:
        if re.search(pattern, message, re.IGNORECASE):
            return cause, remedy
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on any device, or Python could not get the memory it asked for."""
    return isinstance(error, MemoryError) or bool(re.search(NO_MEMORY, f"{type(error).__name__} {error}", re.I))


def is_disk_full(error: BaseException) -> bool:
    """Whether something could not be written for want of space on a disk."""
    number = getattr(error, "errno", None)
    is_full = number in (errno.ENOSPC, errno.EDQUOT) or bool(re.search(NO_SPACE, str(error), re.I))
    return is_full and not re.search(NO_SHARED_MEMORY, str(error))


def record(logs: Path, rank: int, kind: Kind, doing: str, message: str) -> Failure:
    """Write down how this process ended, as far as the disk allows."""
    attempt = int(os.environ.get(ATTEMPT, "0"))
    failure = Failure(rank, socket.gethostname(), kind, doing, message, time.time(), attempt)
    with contextlib.suppress(OSError):
        (logs / f"rank-{rank}.failure.json").write_text(json.dumps(asdict(failure)), encoding="utf-8")
    return failure


def read(logs: Path | FreshFiles, attempt: int) -> list[Failure]:
    """What the processes left in this attempt, the first failure first; echoes of it come last."""
    found = []
    for file in logs.glob("rank-*.failure.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Failure(**json.loads(file.read_text(encoding="utf-8"))))
    found = [failure for failure in found if failure.attempt == attempt]
    return sorted(found, key=lambda failure: (failure.is_echo, failure.time))


def block(failure: Failure, logs: Path) -> list[str]:
    """One failure for a person: who and what first, then why, what to try, and where to read more."""
    if failure.kind in ("user", "integrity"):
        return [f"error: {line}" for line in failure.message.splitlines()]
    lines = [
        f"error: rank {failure.rank} on {failure.host} failed at {failure.doing}: {failure.message.splitlines()[0]}"
    ]
    cause, remedy = explain(failure.message) or (None, "the end of that log; if it is not your doing, tell us")
    if cause:
        lines.append(f"  likely cause: {cause}")
    return [*lines, f"  its whole log: {logs / f'rank-{failure.rank}.log'}", f"  try: {remedy}"]


@contextlib.contextmanager
def recorded(logs: Path | None, rank: int, beat: Beat) -> Iterator[None]:
    """Turn an exception into a record, a traceback in this process's log, and an exit code.

    `logs` None: a process that is alone; its exceptions go their way to `errors.run_main`.
    """
    if logs is None:
        with told_plainly(beat, is_out_of_memory, is_disk_full):
            yield
        return
    terminal = os.dup(2)
    try:
        with own_log(logs / f"rank-{rank}.log", rank), told_plainly(beat, is_disk_full):
            yield
    except (Exception, KeyboardInterrupt) as error:
        kind: Kind = (
            "stopped" if isinstance(error, KeyboardInterrupt)
            else "user" if isinstance(error, UserError)
            else "integrity" if isinstance(error, IntegrityError)
            else "memory" if is_out_of_memory(error)
            else "error"
        )  # fmt: skip
        message = str(error) if kind in ("user", "integrity") else f"{type(error).__name__}: {error}"
        failure = record(logs, rank, kind, beat.doing, message)
        if ATTEMPT not in os.environ and kind != "stopped" and (kind != "user" or rank == 0):
            os.write(terminal, ("\n".join(block(failure, logs)) + "\n").encode())
        # Without the interpreter's own end, which may wait for a process group that has lost a member.
        os._exit({"stopped": EXIT_STOPPED, "user": EXIT_USAGE}.get(kind, EXIT_OURS))
    finally:
        os.close(terminal)


@contextlib.contextmanager
def told_plainly(beat: Beat, *kinds: Callable[[BaseException], bool]) -> Iterator[None]:
    """Turn errors of these kinds, which the user can mend, into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not any(is_kind(error) for is_kind in kinds):
            raise
        message = str(error).splitlines()[0]
        cause, remedy = explain(f"{type(error).__name__} {error}") or ("", "")
        raise UserError(
            f"{cause}, at {beat.doing} ({message}); try {remedy}. What was learned up to the last checkpoint is kept"
        ) from None


@contextlib.contextmanager
def own_log(file: Path, rank: int) -> Iterator[None]:
    """Send what this process and its libraries write to stderr, and to stdout but for rank 0, into its own file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    streams = (2,) if rank == 0 else (1, 2)
    sys.stdout.flush()
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    kept = {stream: os.dup(stream) for stream in streams}
    for stream in streams:
        os.dup2(log, stream)
    os.close(log)
    try:
        yield
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, original in kept.items():
            os.dup2(original, stream)
            os.close(original)
