"""Running the daemon: who may, adapters, leaving, figures, and a log that says nothing of what was written."""

import asyncio
import json
import signal
import urllib.error
import urllib.request

import pytest

from serve.client import connect
from serve.errors import RequestError
from serve.pieces import Accepted, Delta, Done
from serve.protocol import Kind
from tests.serve_fixtures import PATIENCE, Box, RawClient, box, text_of, wait_until
from tests.test_security import free_ports

__all__ = ["box"]


def test_adapters_come_and_go_while_serving(box: Box) -> None:
    box.daemon(0.001)
    folder = box.work / "one"
    folder.mkdir()

    async def say(client, text, **options):
        pieces = [piece async for piece in client.ask([{"role": "user", "content": text}], **options)]
        assert isinstance(pieces[-1], Done)
        accepted = next(piece for piece in pieces if isinstance(piece, Accepted))
        return accepted.adapter, "".join(p.text for p in pieces if isinstance(p, Delta))

    async def talk() -> None:
        with await connect(box.record()) as client:
            with pytest.raises(RequestError, match="try a folder") as caught:
                await client.load(str(folder))
            assert caught.value.code == "E_ADAPTER_INCOMPATIBLE"
            (folder / "prefix").write_text("old ")
            old = await client.load(str(folder))
            assert [a["key"] for a in await client.adapters()] == ["base", old]
            assert await say(client, "x", adapter="one") == (old, "old x")
            (folder / "prefix").write_text("new ")
            new = await client.load(str(folder))
            assert new.partition("@")[0] == old.partition("@")[0] and new != old
            assert await say(client, "x", adapter="one") == (new, "new x")
            # Nobody is answered by the old one any more.
            assert (await say(client, "x"))[0] == "base"
            with pytest.raises(RequestError) as caught:
                await say(client, "x", adapter=old)
            assert (caught.value.code, caught.value.detail) == ("E_NO_ADAPTER", {"adapters": ["base", new]})
            counted = await client.tokenize([{"role": "user", "content": "ñ"}], adapter=new)
            assert counted == {"tokens": 3, "context": 2048, "adapter": new}
            assert await client.unload("one") == new
            assert (await client.status())["adapters"] == ["base"]

    asyncio.run(talk())
    with RawClient(box.record()) as client:
        for kind in (Kind.LOAD, Kind.UNLOAD, Kind.DRAIN, Kind.SHUTDOWN):
            for admin in ({}, {"admin": "0" * 32}, {"admin": 3}):
                assert client.ask(kind, run="x", adapter="base", **admin).body["code"] == "E_AUTH"
        assert client.status()["state"] == "ready"


@pytest.mark.parametrize("way", ["signal", "message"])
def test_leaving_waits_for_the_open_requests(box: Box, way: str) -> None:
    daemon = box.daemon(0.01)
    with RawClient(box.record()) as client:
        request = client.submit("abc" * 100)
        while client.receive("data").kind is not Kind.DELTA:
            pass
        if way == "signal":
            daemon.send_signal(signal.SIGTERM)
            wait_until(lambda: client.status()["state"] == "draining")
        else:
            assert client.ask(Kind.DRAIN, admin=box.record().admin).kind is Kind.STATUS
        refused = client.submit("more")
        endings = {}
        while len(endings) < 2:
            message = client.receive("data")
            if message.kind in (Kind.DONE, Kind.ERROR):
                endings[message.request] = message
        assert endings[refused].body["code"] == "E_DRAINING"
        assert endings[request].body["reason"] == "stop"
    assert daemon.wait(PATIENCE) == 0
    assert box.left() == set()


def test_leaving_has_an_end(box: Box) -> None:
    daemon = box.daemon(0.02, "serve.drain_s=0.5")
    with RawClient(box.record()) as client:
        request = client.submit("x" * 900)
        wait_until(lambda: client.status()["busy_slots"] == 1)
        daemon.send_signal(signal.SIGTERM)
        deltas, last = client.collect(request)
        assert last.body["code"] == "E_DRAINING"
        assert last.body["detail"]["tokens"] == len(text_of(deltas)) > 0
    assert daemon.wait(PATIENCE) == 0


def test_figures_and_the_log(box: Box) -> None:
    port = free_ports()
    box.daemon(0.005, f"METRICS={port}")
    secret = "nobody may read this"
    with RawClient(box.record()) as client:
        assert client.collect(client.submit(secret))[1].kind is Kind.DONE
        status = client.status()
        assert status["first_token_ms"]["p50"] > 0 and status["inter_token_ms"]["p95"] > 4
        assert status["tokens_per_second"] > 0 and status["tokens"] == len(secret)
        assert status["engines"][0]["rss_bytes"] > 2**20 and status["rss_bytes"] > 2**20
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as page:
            lines = page.read().decode().splitlines()
        assert {f"afinar_tokens_total {len(secret)}", 'afinar_requests_total{ending="stop"} 1'} <= set(lines)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE)
    taken = box.run("daemon", "HOLD=echo", "RUN=runs/other", f"METRICS={port}")
    assert taken.returncode == 2 and taken.stderr.count("\n") == 1 and str(port) in taken.stderr
    log = box.runtime / "echo.events.log"
    assert log.stat().st_mode & 0o777 == 0o600
    assert secret not in log.read_text() and json.dumps(secret) not in log.read_text()
    over = next(e for e in box.events() if e["event"] == "request over")
    assert over["how"] == "stop" and over["completion_tokens"] == len(secret)
