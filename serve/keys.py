"""The key pairs without which nothing listens on tcp: files of `zmq.auth`, kept for this user alone.

    daemon.key, daemon.key_secret   the daemon's pair
    client.key, client.key_secret   this user's pair
    clients/*.key                   public keys of who may connect; this user's own is there from the start
    daemons/<host>.key              public keys of daemons elsewhere; without one, a daemon has the pair above

The folder is `~/.local/state/afinar/keys`, 0700. docs/security.md shows what to copy where.
"""

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth

from serve.errors import UserError
from serve.runtime import state_directory

DAEMON, CLIENT = "daemon", "client"
OWN_NAME = "this-user.key"


@dataclass(frozen=True)
class Pair:
    """A CURVE key pair, 40 characters of Z85 each. The secret does not show."""

    public: str
    secret: bytes

    def __repr__(self) -> str:
        return f"Pair({self.public})"


def directory() -> Path:
    """Where the keys of this user are."""
    return state_directory() / "keys"


def make() -> str:
    """Make what is missing, overwriting nothing; what lies where and what to copy for another machine, in words."""
    folder = directory()
    folder.mkdir(mode=0o700, exist_ok=True)
    _require_private(folder)
    is_new = {name: _make_pair(folder, name) for name in (DAEMON, CLIENT)}
    clients = folder / "clients"
    # Who took the own key off the list meant it.
    if is_new[CLIENT] or not clients.exists():
        clients.mkdir(mode=0o700, exist_ok=True)
        shutil.copyfile(folder / f"{CLIENT}.key", clients / OWN_NAME)
    (folder / "daemons").mkdir(mode=0o700, exist_ok=True)
    return _words(folder, is_new)


def daemon_pair() -> Pair:
    """The daemon's pair; raises `UserError` if there is none, or if others can read it."""
    return _load_pair(DAEMON, "a daemon on tcp")


def client_pair() -> Pair:
    """This user's pair; raises `UserError` like `daemon_pair`."""
    return _load_pair(CLIENT, "this daemon")


def daemon_key(host: str) -> str:
    """The public key that the daemon on a host must have; raises `UserError` if none is known."""
    own, theirs = directory() / f"{DAEMON}.key", directory() / "daemons" / f"{host}.key"
    path = theirs if theirs.exists() else own
    if not path.exists():
        raise UserError(f"the daemon on {host} takes keys; try: make keys, then copy its daemon.key to {theirs}")
    return _load(path)[0]


def may_connect(public: bytes) -> bool:
    """Whether a public key is among those in `clients/` now. A file that cannot be read lets nobody in, and harms none."""
    for path in (directory() / "clients").glob("*.key"):
        try:
            if _load(path)[0].encode() == public:
                return True
        except UserError:
            continue
    return False


def _make_pair(folder: Path, name: str) -> bool:
    """Whether the pair was made now."""
    public, secret = folder / f"{name}.key", folder / f"{name}.key_secret"
    if public.exists() != secret.exists():
        there, missing = (public, secret) if public.exists() else (secret, public)
        raise UserError(f"{there} is there but not {missing.name}; put it back, or make a new pair after: rm {there}")
    if public.exists():
        return False
    before = os.umask(0o077)
    try:
        zmq.auth.create_certificates(folder, name)
    finally:
        os.umask(before)
    return True


def _load_pair(name: str, whose: str) -> Pair:
    folder = directory()
    path = folder / f"{name}.key_secret"
    if not path.exists():
        raise UserError(f"{whose} takes keys and there is no {path}; try: make keys")
    _require_private(folder)
    _require_private(path)
    public, secret = _load(path)
    if secret is None or zmq.curve_public(secret).decode() != public:
        raise UserError(f"{path} is damaged; move it away, then: make keys")
    return Pair(public, secret)


def _load(path: Path) -> tuple[str, bytes | None]:
    """The public and the secret key in a file; raises `UserError` for a file that holds no key."""
    try:
        public, secret = zmq.auth.load_certificate(path)
        for key in (public, secret):
            # Refuses what is not 32 bytes in Z85.
            if key is not None:
                zmq.curve_public(key)
        return public.decode("ascii"), secret
    except (OSError, ValueError, zmq.ZMQError) as fault:
        raise UserError(f"{path} is no key file ({fault}); copy it again, or try: make keys") from None


def _require_private(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        mode = "700" if path.is_dir() else "600"
        raise UserError(f"{path} must be yours and closed to others; try: chmod {mode} {path}")


def _words(folder: Path, is_new: dict[str, bool]) -> str:
    said = {name: "made now" if new else "was there, and stays" for name, new in is_new.items()}
    host = os.uname().nodename
    return f"""\
keys are in {folder}
  daemon.key, daemon.key_secret   the daemon's pair ({said[DAEMON]})
  client.key, client.key_secret   yours ({said[CLIENT]})
  clients/                        public keys of who may connect; a file added or removed counts at once
serve on tcp with: make serve LISTEN=0.0.0.0:5555, talk from here with: make chat CONNECT=127.0.0.1:5555
for another machine, run `make keys` there as well and copy two public keys (never a key_secret):
  its client.key   to {folder}/clients/<a name>.key
  {folder}/daemon.key   to its daemons/<host>.key, named as in CONNECT=<host>:5555 (this one is {host})"""
