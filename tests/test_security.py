"""Who gets nothing: another Unix user, a key that is not listed, an impostor. And who looks after a daemon."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth
from zmq.utils.monitor import recv_monitor_message

from serve import curve, keys
from serve.protocol import Code, Kind, Message
from serve.runtime import Record
from tests.serve_fixtures import PATIENCE, Box, RawClient, box, children, text_of

__all__ = ["box"]

NOBODY = 65534
KEYS = Path(".local/state/afinar/keys")


def free_ports() -> int:
    """A port that is free on the loopback, and so is the next one.

    Below those that the system gives to who connects: nobody is given it before the daemon has it.
    """
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port


def pair(home: Path, name: str) -> tuple[bytes, bytes]:
    public, secret = zmq.auth.load_certificate(home / KEYS / f"{name}.key_secret")
    assert secret is not None
    return public, secret


class LockedClient(RawClient):
    """A raw client with any keys, or none; `name` is the routing id it asks for."""

    def __init__(
        self,
        record: Record,
        own: tuple[bytes, bytes] | None = None,
        server: bytes = b"",
        name: bytes = b"",
    ) -> None:
        self.context = zmq.Context()
        self.sockets = {}
        self.session = b""
        for lane, endpoint in (("data", record.data), ("control", record.control)):
            dealer = self.sockets[lane] = self.context.socket(zmq.DEALER)
            if own is not None:
                dealer.set(zmq.CURVE_PUBLICKEY, own[0])
                dealer.set(zmq.CURVE_SECRETKEY, own[1])
                dealer.set(zmq.CURVE_SERVERKEY, server)
            if name:
                dealer.set(zmq.ROUTING_ID, name)
            dealer.connect(endpoint)

    def knock(self) -> None:
        """Say all that might be answered, an error at least."""
        for lane, dealer in self.sockets.items():
            # A dealer whose key was refused meanwhile has nobody left to send to, and would wait for ever.
            dealer.set(zmq.SNDTIMEO, 0)
            with contextlib.suppress(zmq.Again):
                for kind in (Kind.HELLO, Kind.STATUS, Kind.SUBMIT):
                    self.send(lane, Message(kind, os.urandom(16), {"proto": [1], "messages": [], "session": b"x" * 16}))
                dealer.send_multipart([b"no message"])

    @property
    def has_heard(self) -> bool:
        return any(dealer.poll(0) for dealer in self.sockets.values())


PROBE = """
import json, os, socket, sys
user = int(sys.argv[1])
os.setgroups([]); os.setgid(user); os.setuid(user)
results = {}
for path in sys.argv[2:]:
    try:
        if path.endswith(".json"):
            open(path).close()
        else:
            socket.socket(socket.AF_UNIX).connect(path)
        results[path] = "open"
    except OSError as fault:
        results[path] = type(fault).__name__
print(json.dumps(results))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_unix_user_gets_nothing(box: Box) -> None:
    box.daemon()
    # What protects is the runtime directory, not the folder of the test.
    box.folder.chmod(0o755)
    paths = [str(box.runtime / f"echo.{end}") for end in ("json", "data", "control")]

    def probe(user: int) -> set[str]:
        # It becomes that user after it has started: the interpreter may lie in a home.
        words = [sys.executable, "-I", "-c", PROBE, str(user), *paths]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return set(json.loads(done.stdout).values())

    assert probe(0) == {"open"}
    assert probe(NOBODY) == {"PermissionError"}
    # Were the directory open, the files would still be shut.
    box.runtime.chmod(0o755)
    assert probe(NOBODY) == {"PermissionError"}
    done = box.run("chat", stdin="hi")
    assert done.returncode == 2 and done.stderr.strip().endswith(f"chmod 700 {box.runtime}")


def listening(pids: list[int]) -> set[int]:
    """The tcp ports on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            # Another thread may have closed it since it was listed.
            with contextlib.suppress(FileNotFoundError):
                inodes.add(str(link.readlink()))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def test_only_a_listed_key_gets_in(box: Box) -> None:
    port = free_ports()
    assert box.run("keys").returncode == 0
    daemon = box.daemon(0.0, f"LISTEN=127.0.0.1:{port}", "NGPU=2")
    record = box.record()
    assert listening([daemon.pid, *children(daemon.pid)]) == {port, port + 1}
    remote = Record("", "", "", f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}", 0, 0, "")
    server, own, stranger = record.server_key.encode(), pair(box.folder, "client"), zmq.curve_keypair()
    refused = {
        "no keys": LockedClient(remote),
        "no keys, here": LockedClient(record),
        "an unlisted key": LockedClient(remote, stranger, server),
        "an unlisted key, here": LockedClient(record, stranger, server),
        "another daemon's key": LockedClient(remote, own, stranger[0]),
        # Its secret is not the one of the public key that it shows.
        "a borrowed public key": LockedClient(remote, (own[0], stranger[1]), server),
    }
    for client in refused.values():
        client.knock()
    for endpoints in (remote, record):
        with LockedClient(endpoints, own, server) as listed:
            assert text_of(listed.collect(listed.submit("let me in"))[0]) == "let me in"
            assert listed.ask(Kind.SHUTDOWN).body["code"] == Code.AUTH
    # Long enough for those who were refused to have knocked several times.
    time.sleep(1.0)
    assert [name for name, client in refused.items() if client.has_heard] == []
    assert {e["key"] for e in box.events() if e["event"] == "refused"} == {stranger[0].decode()}
    with LockedClient(remote, own, server) as listed:
        num_clients = listed.status()["clients"]
    for client in refused.values():
        client.__exit__()
    # The listed ones, of which two have left and may be noticed as gone; none of those who were refused.
    assert 1 <= num_clients <= 3


def test_without_an_authenticator_nobody_comes_in() -> None:
    server, own = zmq.curve_keypair(), zmq.curve_keypair()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        curve.guard_router(router, keys.Pair(server[0].decode(), server[1]))
        port = router.bind_to_random_port("tcp://127.0.0.1")
        dealer.set(zmq.CURVE_PUBLICKEY, own[0])
        dealer.set(zmq.CURVE_SECRETKEY, own[1])
        dealer.set(zmq.CURVE_SERVERKEY, server[0])
        dealer.set(zmq.LINGER, 0)
        refusals = dealer.get_monitor_socket(curve.WATCHED)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send(b"anybody?")
        assert refusals.poll(PATIENCE * 1e3) and not router.poll(100)
        assert recv_monitor_message(refusals)["event"] != zmq.EVENT_HANDSHAKE_SUCCEEDED
        dealer.disable_monitor()


def test_chat_from_another_machine(box: Box) -> None:
    port = free_ports()
    box.run("keys")
    daemon = box.daemon(0.0, f"LISTEN=127.0.0.1:{port}")
    there = box.folder / "there"
    there.mkdir()

    def chat(**extra: str) -> Any:
        done = box.run("chat", f"CONNECT=localhost:{port}", stdin="hi", AFINAR_RUNTIME_DIR=str(there / "r"), **extra)
        assert done.stderr.count("\n") == (done.returncode != 0)
        return done.returncode, done.stdout or done.stderr

    assert chat() == (0, "hi\n")
    code, line = chat(HOME=str(there))
    assert code == 2 and "try: make keys" in line
    box.run("keys", HOME=str(there))
    code, line = chat(HOME=str(there))
    assert code == 3 and "has another key" in line and "daemon.key" in line
    shutil.copy(box.folder / KEYS / "daemon.key", there / KEYS / "daemons" / "localhost.key")
    code, line = chat(HOME=str(there))
    assert code == 3 and "does not know your key" in line and "client.key" in line
    listed = box.folder / KEYS / "clients" / "there.key"
    # What is no key lets nobody in, and keeps nobody out.
    (listed.parent / "a.key").write_bytes(b"\xff not a key\n")
    shutil.copy(there / KEYS / "client.key", listed)
    assert chat(HOME=str(there)) == (0, "hi\n")
    assert box.run("status", f"CONNECT=localhost:{port}", HOME=str(there)).stdout.startswith(f"localhost:{port}: echo")
    listed.unlink()
    assert chat(HOME=str(there))[0] == 3
    daemon.terminate()
    daemon.wait()
    code, line = chat()
    assert code == 3 and "nothing listens" in line


def test_without_keys_nothing_listens(box: Box) -> None:
    port = free_ports()

    def refusal(*words: str) -> str:
        done = box.run("daemon", "HOLD=echo", *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert box.left() == set()
        return done.stderr

    for host in ("0.0.0.0", "127.0.0.1", "*"):
        assert refusal(f"LISTEN={host}:{port}").strip().endswith("try: make keys")
    first = box.run("keys")
    assert first.returncode == 0 and "made now" in first.stdout
    folder = box.folder / KEYS
    secret = folder / "daemon.key_secret"
    assert [p.stat().st_mode & 0o777 for p in (folder, secret, folder / "client.key_secret")] == [0o700, 0o600, 0o600]
    assert pair(box.folder, "client")[1].decode() not in first.stdout
    before = {path: path.read_bytes() for path in folder.rglob("*.key*")}
    (own,) = (folder / "clients").iterdir()
    own.unlink()
    assert "made now" not in box.run("keys").stdout
    assert {path: path.read_bytes() for path in folder.rglob("*.key*")} == {p: t for p, t in before.items() if p != own}
    secret.chmod(0o640)
    assert refusal(f"LISTEN=127.0.0.1:{port}").strip().endswith(f"chmod 600 {secret}")
    secret.chmod(0o600)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 1))
        taken.listen()
        assert f"port {port + 1}: Address already in use; try" in refusal(f"LISTEN=127.0.0.1:{port}")
    assert "try another host" in refusal(f"LISTEN=no-such-host.invalid:{port}")
    secret.write_text(secret.read_text().replace('secret-key = "', 'secret-key = "0'))
    assert "make keys" in refusal(f"LISTEN=127.0.0.1:{port}")
    secret.unlink()
    done = box.run("keys")
    assert done.returncode == 2 and "daemon.key_secret" in done.stderr


def test_an_impostor_hears_nothing_of_anothers_answer(box: Box) -> None:
    box.daemon(0.005)
    record = box.record()
    text = "between the two of us " * 8
    # The worst case: the ids of connection and request are known, only the secret of the session is not.
    with LockedClient(record, name=b"victim") as victim, RawClient(record) as impostor:
        request = victim.submit(text)
        assert victim.receive("data").kind is Kind.ACCEPTED
        double = LockedClient(record, name=b"victim")
        double.knock()
        impostor.cancel(request)
        impostor.send("data", Message(Kind.CREDIT, request, {"count": 100}))
        impostor.submit("mine?", request)
        for session in (b"", bytes(16), b"victim", victim.session[:-1], victim.session + b"x", 7, None):
            impostor.submit("mine?", request, session=session, have=0)
            impostor.send("control", Message(Kind.HELLO, body={"proto": [1], "session": session}))
        impostor.send("control", Message(Kind.PING, request))
        deltas, done = victim.collect(request)
        assert (text_of(deltas), done.kind) == (text, Kind.DONE)
        # Nor when it is over, and kept for who asked.
        impostor.submit("mine?", request, have=0)
        with RawClient(record) as late:
            late.submit("mine?", request, have=0)
            assert late.receive("data").body["code"] == Code.BAD_REQUEST
        answers = [impostor.receive("data") for _ in range(9)]
        assert {answer.kind for answer in answers} == {Kind.ERROR} and impostor.is_quiet()
        heard = []
        while impostor.sockets["control"].poll(200):
            heard.append(impostor.receive("control"))
        assert {message.kind for message in heard} == {Kind.WELCOME, Kind.PONG}
        assert victim.session not in [message.body.get("session") for message in heard]
        assert not any(message.body.get("attached") for message in heard)
        assert not double.has_heard
        double.__exit__()
        # The one whose secret it is comes back on another connection, and gets it all.
        with RawClient(record, session=victim.session) as again:
            again.submit(text, request, have=0)
            deltas, done = again.collect(request)
            assert ("".join(d.body["text"] for d in deltas), done.kind) == (text, Kind.DONE)


def test_a_daemon_of_several_runs_is_found_under_each(box: Box) -> None:
    for name in ("one", "two"):
        (box.work / "runs" / name).mkdir(parents=True)
        (box.work / "runs" / name / "prefix").write_text(f"{name} ")
    daemon = box.daemon(0.0, "RUNS=one two")
    for name in ("one", "two"):
        # It is there already; to load it again changes nothing.
        assert box.run("load", f"RUN={name}", f"ADAPTER={name}").stdout.startswith(f"loaded {name}@")
        assert box.run("chat", f"RUN={name}", stdin="x").stdout == f"{name} x\n"
        again = box.run("daemon", "HOLD=echo", f"RUNS=three {name}")
        assert again.returncode == 2 and f"already served by process {daemon.pid}" in again.stderr
    assert box.run("chat", "RUN=one", "ADAPTER=base", stdin="x").stdout == "x\n"
    other = box.run("chat", "START=yes", "RUN=one", "HOLD=adapters", stdin="x")
    assert other.returncode == 2 and "served with HOLD=echo already" in other.stderr
    # From another folder, by its path.
    elsewhere = box.run("status", f"RUN={box.work}/runs/two")
    assert "process" in elsewhere.stdout and "adapter     two@" in elsewhere.stdout
    assert box.run("load", "ADAPTER=nothing").returncode == 2
    assert box.run("load").stderr.count("\n") == 1
    assert box.run("unload", "RUN=two", "ADAPTER=one").stdout.startswith("unloaded one@")
    gone = box.run("chat", "RUN=one", stdin="x")
    assert gone.returncode == 2 and "no adapter 'one'" in gone.stderr
    assert box.run("stop", "RUN=two").returncode == 0
    assert daemon.wait(PATIENCE) == 0 and box.left() == set()
    assert box.run("status").returncode == 3
