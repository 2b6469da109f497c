"""The runtime directory: where a daemon says that it serves a run, and where clients look for one.

    <name>.json                     the discovery file, written after the sockets are bound
    <name>.{data,control}           the sockets of clients, <name>.engine<i> those of the engine processes
    <name>.lock                     held as long as the daemon lives; the kernel lets go
    <name>.log, <name>.engine<i>.log   what a daemon in the background, and every engine process, had to say

The directory is 0700 and belongs to the user: who can open it may talk to the daemon.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serve.arguments import MAX_ENGINES
from serve.errors import UserError

# sun_path holds 108 bytes, the last of them is zero.
MAX_SOCKET_PATH = 107
SOCKETS = ("data", "control")


@dataclass(frozen=True)
class Record:
    """A discovery file. `started` is the process start time in kernel ticks: a pid may be somebody else's by now.

    `run` is the first of `runs`. `admin` is the token without which nothing is loaded, unloaded or stopped; `server_key`
    the daemon's public CURVE key, "" where the sockets need none. A daemon on another machine has the pid 0.
    """

    name: str
    run: str
    hold: str
    data: str
    control: str
    pid: int
    started: int
    epoch: str
    runs: tuple[str, ...] = ()
    admin: str = ""
    server_key: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether the daemon that wrote it still runs, as far as this machine can know."""
        return self.pid == 0 or start_time(self.pid) == self.started


def directory() -> Path:
    """The runtime directory, made if need be; raises `UserError` if others could look into it."""
    path = _choose_directory()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}; try another AFINAR_RUNTIME_DIR") from None
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise UserError(f"{path} must be yours and closed to others; try: chmod 700 {path}")
    return path


def socket_path(folder: Path, name: str, socket: str) -> Path:
    """Where a socket lies; raises `UserError` if the system cannot hold so long a path."""
    path = folder / f"{name}.{socket}"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise UserError(
            f"{path}: longer than the {MAX_SOCKET_PATH} bytes of a socket's path; try a shorter folder: "
            f"AFINAR_RUNTIME_DIR=/tmp/afinar-{os.getuid()}"
        )
    return path


def start_time(pid: int) -> int | None:
    """When a process started, in ticks since boot; None if there is no such process or it is a zombie."""
    try:
        # The name, the second field, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def publish(folder: Path, record: Record) -> None:
    """Write the discovery file: a temporary name, 0600, then renamed."""
    part = folder / f"{record.name}.json.part"
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(dataclasses.asdict(record), file)
    part.replace(folder / f"{record.name}.json")


def find(folder: Path, name: str) -> Record | None:
    """The live daemon of that name, None if there is none; the traces of a dead one are removed."""
    record = _read(folder / f"{name}.json")
    if record is not None and record.is_alive:
        return record
    if record is not None:
        with contextlib.suppress(UserError), claimed(folder, name):
            pass
    return None


def find_all(folder: Path) -> list[Record]:
    """All live daemons, by name."""
    names = sorted(path.stem for path in folder.glob("*.json"))
    return [record for name in names if (record := find(folder, name)) is not None]


@contextlib.contextmanager
def claimed(folder: Path, name: str) -> Iterator[None]:
    """Be the only daemon of that name; raises `UserError` naming the pid of another. Removes all traces at the end."""
    for socket in (*SOCKETS, f"engine{MAX_ENGINES - 1}"):
        socket_path(folder, name, socket)
    with os.fdopen(os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600), "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = lock.read().strip()
            raise UserError(f"{name} is already served by process {pid}; try: make chat, or kill {pid}") from None
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        _remove_traces(folder, name)
        try:
            yield
        finally:
            _remove_traces(folder, name)


def _choose_directory() -> Path:
    if chosen := os.environ.get("AFINAR_RUNTIME_DIR"):
        return Path(chosen).absolute()
    system = os.environ.get("XDG_RUNTIME_DIR")
    # The variable may survive `sudo` or a container's start while its folder does not.
    if system and os.access(system, os.W_OK):
        return Path(system) / "afinar"
    return state_directory() / "run"


def state_directory() -> Path:
    """Where what outlives a login is kept."""
    path = Path.home() / ".local" / "state" / "afinar"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _read(path: Path) -> Record | None:
    try:
        status = path.stat()
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise UserError(f"{path} was not written by your daemon; try: rm {path}")
    try:
        fields = json.loads(text)
        return Record(**{**fields, "runs": tuple(fields.get("runs", ()))})
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; try: rm {path}") from None


def _remove_traces(folder: Path, name: str) -> None:
    engines = (f"engine{i}" for i in range(MAX_ENGINES))
    for suffix in ("json", "json.part", *SOCKETS, *engines):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)
