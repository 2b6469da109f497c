"""docs/protocol.md says what the code does: types, directions, keys and codes, also as a running daemon uses them."""

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from typing import Any

import pytest

from serve.administration import LEAST_QUESTION_BYTES, MAX_QUESTION_BYTES
from serve.daemon import UNREAD
from serve.limits import limits
from serve.open_requests import Lane
from serve.protocol import ADMIN, REQUIRED, RETRYABLE, Code, Kind, Message, decode, encode
from serve.settings import Settings
from serve.submission import Submission
from tests.serve_fixtures import ROOT, Box, RawClient, box

__all__ = ["box"]
PAGE = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
TYPES: dict[str, Any] = {
    "list": list,
    "int": int,
    "text": str,
    "bytes": bytes,
    "map": dict,
    "bool": bool,
    "number": (int, float),
}
ID = bytes(range(16))


@dataclass(frozen=True)
class Section:
    """What the page says of one type. `keys` are (type, needed) by name, `ways` like `client → daemon, data`."""

    byte: bytes
    ways: tuple[str, ...]
    keys: dict[str, tuple[str, str]]
    example: dict[str, Any]
    words: set[str]


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def in_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: in_bytes(inner) for key, inner in value.items()}
    is_bytes = isinstance(value, str) and value.startswith("hex:")
    return bytes.fromhex(value.removeprefix("hex:")) if is_bytes else value


def read_page() -> dict[str, Section]:
    found = {}
    for part in PAGE.partition("\n## Codes")[0].split("\n### ")[1:]:
        head = re.fullmatch(r"`(\w+)` · `(.)`", part.splitlines()[0])
        assert head, part.splitlines()[0]
        ways = tuple(part.splitlines()[1].strip("*").split("; "))
        keys = {row[0].strip("`"): (row[1], row[2]) for row in rows(part) if row[0].startswith("`")}
        example = re.search(r"```json\n(.*?)```", part, re.DOTALL)
        assert example, head[1]
        found[head[1]] = Section(head[2].encode(), ways, keys, in_bytes(json.loads(example[1])), words_of(part))
    return found


SECTIONS = read_page()
CODES = {row[0].strip("`"): row[1:3] for row in rows(PAGE.partition("\n## Codes")[2]) if row[0].startswith("`E_")}


def test_the_page_has_every_type_and_no_other() -> None:
    assert {name: section.byte for name, section in SECTIONS.items()} == {kind.name: kind.value for kind in Kind}


def test_the_page_has_every_code_and_no_other() -> None:
    assert {code: row[0] for code, row in CODES.items()} == {c.value: "yes" if c in RETRYABLE else "no" for c in Code}


@pytest.mark.parametrize("kind", Kind)
def test_required_keys_and_examples(kind: Kind) -> None:
    section = SECTIONS[kind.name]
    needed = {name: TYPES[of] for name, (of, needed) in section.keys.items() if needed == "yes"}
    assert needed == REQUIRED[kind]
    assert decode(encode(Message(kind, ID, section.example))).body == section.example
    check_keys(kind, section.example)
    assert ("admin" in section.keys) == (kind in ADMIN) == any(way.startswith("admin ") for way in section.ways)


def test_the_page_has_every_limit_with_its_number() -> None:
    told = limits(Settings())
    page = PAGE.partition("### `HELLO`")[0]
    table = {name: row[1] for row in rows(page) for name in words_of(row[0])}
    assert SECTIONS["WELCOME"].example["limits"] == told
    bounds = {"queue": "`serve.queue`, `serve.share`", "share": "`serve.queue`, `serve.share`"}
    assert told.keys() - table.keys() == {"credit", "ping_seconds", "silence_seconds"}
    assert {name: table[name] for name in told.keys() & table.keys()} == {
        name: bounds.get(name, str(told[name])) for name in told.keys() & table.keys()
    }
    assert f"{UNREAD[Lane.DATA]} on data, {UNREAD[Lane.CONTROL]} on control" in page
    assert f"{MAX_QUESTION_BYTES} bytes in all, each at least {LEAST_QUESTION_BYTES}" in page


def test_every_option_of_a_submission_is_on_the_page() -> None:
    fields = Submission([]).to_body().keys()
    assert SECTIONS["SUBMIT"].keys.keys() == fields | {"session", "have", "client"}
    assert SECTIONS["ACCEPTED"].keys.keys() >= {f.name for f in dataclasses.fields(Submission([]).sampling)}


def check_keys(kind: Kind, body: dict[str, Any], needed: str = "yes") -> None:
    """Every key of a body is on the page with its type, and those that the page calls `needed` are there."""
    section = SECTIONS[kind.name]
    for name, value in body.items():
        assert name in section.keys, (kind, name)
        assert value is None or isinstance(value, TYPES[section.keys[name][0]]), (kind, name, value)
        for inner in value if isinstance(value, list) else [value]:
            # Endings and codes are counted by name; what is in them is no key of the protocol.
            if isinstance(inner, dict) and name not in ("requests", "detail"):
                assert inner.keys() <= section.words | SECTIONS["READY"].words | SECTIONS["SUBMIT"].words, (
                    kind,
                    name,
                    inner,
                )
    assert {name for name, key in section.keys.items() if key[1] in ("yes", needed)} <= body.keys(), kind
    if kind is Kind.ERROR:
        assert body["detail"].keys() <= words_of(CODES[body["code"]][1]), body


def exchange(client: RawClient, lane: str, message: Message) -> list[Message]:
    """What comes back at once to this message: all before the answer to one that nobody takes."""
    marker = Message(Kind.PONG, os.urandom(16))
    client.send(lane, message)
    client.send(lane, marker)
    received = []
    while True:
        received.append(client.receive(lane))
        if received[-1].request == marker.request:
            check_keys(Kind.ERROR, received[-1].body)
            # WELCOME belongs to no request; what an engine says to an earlier question may come between.
            return [m for m in received[:-1] if m.request == message.request or m.kind is Kind.WELCOME]


def ask(client: RawClient, kind: Kind, **body: Any) -> Message:
    """A question on control and its answer, which is as the page says."""
    asked = Message(kind, os.urandom(16), body)
    client.send("control", asked)
    while (answer := client.receive("control")).request != asked.request:
        pass
    assert "daemon → client, control" in SECTIONS[answer.kind.name].ways
    check_keys(answer.kind, answer.body, needed="in the answer")
    return answer


def test_a_daemon_takes_each_type_where_the_page_says_so(box: Box) -> None:
    box.daemon()
    with RawClient(box.record()) as client:
        for kind in Kind:
            for lane in ("data", "control"):
                body = {**SECTIONS[kind.name].example, "session": client.session, "admin": "guess"}
                answers = exchange(client, lane, Message(kind, os.urandom(16), body))
                refused = any(a.body.get("code") == Code.UNSUPPORTED for a in answers)
                ways = SECTIONS[kind.name].ways
                taken = {f"client → daemon, {lane}", f"admin → daemon, {lane}"} & set(ways)
                assert refused != bool(taken), (kind, lane, answers)
                if any(way.startswith("admin ") for way in taken):
                    assert [a.body["code"] for a in answers] == [Code.AUTH]


def test_a_daemon_says_what_the_page_says(box: Box) -> None:
    daemon = box.daemon(0.0, "serve.queue=1", "serve.slots=1")
    admin = box.record().admin
    adapter = box.folder / "tilde"
    adapter.mkdir()
    (adapter / "prefix").write_text("~")
    with RawClient(box.record()) as client:
        seen = {message.kind for message in talk(client)}
        assert seen == {Kind.ACCEPTED, Kind.PROGRESS, Kind.DELTA, Kind.DONE, Kind.ERROR}
        welcome = exchange(client, "control", Message(Kind.HELLO, body={"proto": [1]}))[0]
        check_keys(Kind.WELCOME, welcome.body)
        messages = [{"role": "user", "content": "hola"}]
        assert ask(client, Kind.LOAD, run=str(adapter), admin=admin).body["loaded"].startswith("tilde@")
        assert ask(client, Kind.TOKENIZE, messages=messages, adapter="tilde").body["tokens"] == 5
        assert len(ask(client, Kind.ADAPTERS).body["adapters"]) == 2
        assert ask(client, Kind.UNLOAD, adapter="tilde", admin=admin).kind is Kind.ADAPTERS
        assert ask(client, Kind.STATUS).body["requests"]["stop"] == 1
        assert ask(client, Kind.PING).kind is Kind.PONG
        assert ask(client, Kind.LOAD, run=str(adapter / "no"), admin=admin).body["code"] == Code.ADAPTER_INCOMPATIBLE
        assert ask(client, Kind.UNLOAD, adapter="tilde", admin=admin).body["code"] == Code.NO_ADAPTER
        assert ask(client, Kind.TOKENIZE, messages=3).body["code"] == Code.BAD_REQUEST
        assert ask(client, Kind.DRAIN, admin=admin).kind is Kind.STATUS
    assert daemon.wait(10) == 0


def talk(client: RawClient) -> list[Message]:
    """What the daemon says on data to three requests: an answer, a refusal, and one that finds no adapter."""
    bodies = ({"wants_ids": True, "stop": ["z"]}, {"have": 0, "temperature": -1}, {"adapter": "no"})
    requests = {client.submit("hola", **body) for body in bodies}
    received = []
    while requests:
        message = client.receive("data")
        assert "daemon → client, data" in SECTIONS[message.kind.name].ways
        check_keys(message.kind, message.body, needed="to clients")
        received.append(message)
        if message.kind in (Kind.DONE, Kind.ERROR):
            requests.remove(message.request)
    return received
