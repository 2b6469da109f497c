"""Engine processes that die, hang and share the work."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from serve.engines import engine_environment
from serve.protocol import Kind
from tests.serve_fixtures import Box, RawClient, box, children, text_of, wait_until

__all__ = ["box"]


def write_adapter(box: Box, name: str, prefix: str) -> str:
    folder = box.work / name
    folder.mkdir(exist_ok=True)
    (folder / "prefix").write_text(prefix)
    return str(folder)


def load(client: RawClient, box: Box, run: str) -> str:
    return str(client.ask(Kind.LOAD, run=run, admin=box.record().admin).body["loaded"])


def test_a_dead_engine_is_replaced_and_what_had_not_begun_goes_on(box: Box) -> None:
    daemon = box.daemon(0.01, "serve.slots=1")
    (engine,) = children(daemon.pid)
    with RawClient(box.record()) as client:
        load(client, box, write_adapter(box, "one", "1:"))
        running = client.submit("x" * 900)
        while client.receive("data").kind is not Kind.DELTA:
            pass
        waiting = client.submit("later", adapter="one")
        wait_until(lambda: client.status()["waiting"] == 1)
        os.kill(engine, signal.SIGKILL)
        _, last = client.collect(running)
        assert (last.body["code"], last.body["retryable"]) == ("E_ENGINE", True)
        assert last.body["detail"]["tokens"] > 0
        deltas, last = client.collect(waiting)
        assert (text_of(deltas), last.kind) == ("1:later", Kind.DONE)
        status = client.status()
        assert status["engines"][0]["pid"] == children(daemon.pid)[0] != engine
        assert status["requests"] == {"E_ENGINE": 1, "stop": 1}
    assert [e["event"] for e in box.events()].count("engine died") == 1


def test_an_engine_that_hangs_is_killed(box: Box) -> None:
    # Every step takes longer than an engine may be silent.
    box.daemon(4.0, "serve.hung_s=1")
    with RawClient(box.record()) as client:
        request = client.submit("x")
        codes = []
        while not codes:
            client.status()
            if client.sockets["data"].poll(500):
                message = client.receive("data")
                codes += [message.body["code"]] if message.kind is Kind.ERROR else []
                assert message.request == request
        assert codes == ["E_ENGINE"]
    # Nothing had been said, so it was tried once more.
    assert [e["event"] for e in box.events()].count("engine hung") == 2


def test_two_engines_share_the_work_and_keep_their_conversations(box: Box) -> None:
    daemon = box.daemon(0.01, "NGPU=2")
    wait_until(lambda: len(children(daemon.pid)) == 2)

    def busy() -> list[int]:
        return [engine["busy_slots"] for engine in client.status()["engines"]]

    with RawClient(box.record()) as client:
        wait_until(lambda: [e["state"] for e in client.status()["engines"]] == ["ready", "ready"])
        assert client.status()["num_slots"] == 16
        long = client.submit("x" * 900)
        wait_until(lambda: busy() == [1, 0])
        # The other engine has less to do, and from then on it has read this conversation.
        assert client.collect(client.submit("hola"))[1].kind is Kind.DONE
        client.cancel(long)
        wait_until(lambda: busy() == [0, 0])
        turns = [("user", "hola"), ("assistant", "hola"), ("user", "y" * 900)]
        again = client.submit("", messages=[{"role": role, "content": text} for role, text in turns])
        wait_until(lambda: busy() == [0, 1])
        key = load(client, box, write_adapter(box, "both", "2:"))
        # Loaded everywhere: the engine with less to do has it, and so has the other one.
        assert text_of(client.collect(client.submit("z", adapter=key))[0]) == "2:z"
        client.cancel(again)
        wait_until(lambda: busy() == [0, 0])
        long = client.submit("x" * 900)
        wait_until(lambda: busy() == [1, 0])
        assert text_of(client.collect(client.submit("z", adapter=key))[0]) == "2:z"


def test_several_engines_without_gpus_share_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    cores = len(os.sched_getaffinity(0))
    assert engine_environment(2)["OMP_NUM_THREADS"] == str(max(cores // 2, 1))
    assert "OMP_NUM_THREADS" not in engine_environment(1)
    tool = tmp_path / "nvidia-smi"
    tool.touch(mode=0o755)
    assert "OMP_NUM_THREADS" not in engine_environment(2)


@pytest.mark.parametrize("loads", [0, 1])
def test_an_adapter_that_one_engine_refuses_is_served_by_none(box: Box, loads: int) -> None:
    daemon = box.daemon(0.0, "NGPU=2")
    with RawClient(box.record()) as client:
        wait_until(lambda: [e["state"] for e in client.status()["engines"]] == ["ready", "ready"])
        pids = [engine["pid"] for engine in client.status()["engines"]]
        folder = box.work / "half"
        folder.mkdir()
        # Only this engine has such a thread, so only it can read the file.
        (folder / "prefix").symlink_to(f"/proc/self/task/{pids[loads]}/comm")
        answer = client.ask(Kind.LOAD, run=str(folder), admin=box.record().admin)
        assert answer.body["code"] == "E_ADAPTER_INCOMPATIBLE" and "try a folder" in answer.body["message"]
        os.kill(pids[1 - loads], signal.SIGKILL)
        wait_until(lambda: client.status()["engines"][1 - loads]["state"] == "down")
        # The other had loaded it, and has taken it back.
        assert client.status()["adapters"] == ["base"]
        _, last = client.collect(client.submit("x", adapter="half"))
        assert last.body["code"] == "E_NO_ADAPTER"
        # Nor is it loaded when an engine starts again.
        wait_until(lambda: client.status()["engines"][1 - loads]["state"] == "ready")
        assert client.status()["adapters"] == ["base"]
    assert daemon.poll() is None


def events(box: Box) -> list[str]:
    (name,) = (path.stem for path in box.runtime.glob("*.json"))
    return [e["event"] for e in box.events(name)]


def restart(box: Box, daemon: "subprocess.Popen[str]", client: RawClient) -> None:
    """Kill an engine and wait until another is in its place."""
    (engine,) = children(daemon.pid)
    num_ready = events(box).count("ready")
    os.kill(engine, signal.SIGKILL)
    wait_until(lambda: events(box).count("ready") > num_ready)


def names(client: RawClient) -> list[str]:
    return [adapter["name"] for adapter in client.ask(Kind.ADAPTERS).body["adapters"]]


def test_an_engine_that_starts_again_has_what_the_last_one_had(box: Box) -> None:
    one, two, three = (write_adapter(box, name, f"{name}:") for name in ("one", "two", "three"))
    daemon = box.daemon(0.0, f"RUNS={one} {two}")
    admin = box.record("one").admin
    with RawClient(box.record("one")) as client:
        assert client.ask(Kind.UNLOAD, adapter="one", admin=admin).body["unloaded"].startswith("one@")
        # Not even its folder is needed any more.
        shutil.rmtree(one)
        assert client.ask(Kind.LOAD, run=three, admin=admin).body["loaded"].startswith("three@")
        restart(box, daemon, client)
        wait_until(lambda: names(client) == ["base", "two", "three"])
        assert client.ask(Kind.UNLOAD, adapter="two", admin=admin).kind is Kind.ADAPTERS
        assert client.ask(Kind.UNLOAD, adapter="three", admin=admin).kind is Kind.ADAPTERS
        write_adapter(box, "one", "one:")
        # Nothing is left: the base comes from the runs of the beginning, which go again.
        restart(box, daemon, client)
        wait_until(lambda: names(client) == ["base"])
        assert client.collect(client.submit("x", adapter="two"))[1].body["code"] == "E_NO_ADAPTER"


def test_a_run_that_cannot_be_loaded_again_is_told_in_the_log(box: Box) -> None:
    daemon = box.daemon()
    with RawClient(box.record()) as client:
        load(client, box, one := write_adapter(box, "one", "1:"))
        load(client, box, write_adapter(box, "two", "2:"))
        shutil.rmtree(one)
        restart(box, daemon, client)
        wait_until(lambda: names(client) == ["base", "two"])
        (refused,) = (e for e in box.events() if e["event"] == "engine refused")
        assert (refused["engine"], refused["code"]) == (0, "E_ADAPTER_INCOMPATIBLE") and one in refused["why"]
        assert client.collect(client.submit("x", adapter="one"))[1].body["code"] == "E_NO_ADAPTER"
        # It is loaded as soon as it can be.
        load(client, box, write_adapter(box, "one", "1:"))
        assert text_of(client.collect(client.submit("x", adapter="one"))[0]) == "1:x"


def test_an_adapter_is_unloaded_by_all_engines_or_by_none(box: Box) -> None:
    daemon = box.daemon(0.05, "NGPU=2")
    with RawClient(box.record()) as client:
        wait_until(lambda: [e["state"] for e in client.status()["engines"]] == ["ready", "ready"])
        admin, run = box.record().admin, write_adapter(box, "one", "1:")
        key = load(client, box, run)
        # The engines take turns: while one is answering, the other would let the adapter go.
        running = client.submit("x" * 900, adapter="one")
        wait_until(lambda: client.status()["engines"][0]["busy_slots"] == 1)
        refused = client.ask(Kind.UNLOAD, adapter="one", admin=admin)
        assert refused.body["code"] == "E_NO_ADAPTER" and "is answering" in refused.body["message"]
        other = client.submit("x", adapter=key)
        assert text_of(client.collect(other)[0]) == "1:x"
        client.cancel(running)
        wait_until(lambda: client.ask(Kind.UNLOAD, adapter="one", admin=admin).body.get("unloaded") == key)
        assert names(client) == ["base"]
        # An engine that could not load it when it started again is not in the way.
        load(client, box, run)
        shutil.rmtree(run)
        pid = client.status()["engines"][1]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "engine refused" in events(box))
        assert client.ask(Kind.UNLOAD, adapter="one", admin=admin).body.get("unloaded") == key
        assert names(client) == ["base"]
    assert daemon.poll() is None


def test_no_run_takes_the_name_of_the_base(box: Box) -> None:
    daemon = box.daemon(0.0)
    with RawClient(box.record()) as client:
        for run in (folder := write_adapter(box, "base", "1:"), f"{folder}/", f"{folder}/."):
            refused = client.ask(Kind.LOAD, run=run, admin=box.record().admin)
            assert refused.body["code"] == "E_ADAPTER_INCOMPATIBLE" and "rename the folder" in refused.body["message"]
        assert text_of(client.collect(client.submit("x"))[0]) == "x"
    assert box.run("load", f"ADAPTER={folder}").stderr.count("rename the folder") == 1
    assert daemon.poll() is None and "engine died" not in events(box)


def test_the_echo_engine_serves_the_runs_that_it_is_told(box: Box) -> None:
    runs = [write_adapter(box, name, f"{name}:") for name in ("one", "two")]
    box.daemon(0.0, f"RUNS={' '.join(runs)}")
    (name,) = (path.stem for path in box.runtime.glob("*.json"))
    with RawClient(box.record(name)) as client:
        assert [key.partition("@")[0] for key in client.status()["adapters"]] == ["base", "one", "two"]
        assert text_of(client.collect(client.submit("x", adapter="two"))[0]) == "two:x"
    refused = box.run("daemon", "HOLD=echo", f"RUNS={box.work}/three {box.work}/four")
    assert refused.returncode == 2 and "try a folder" in refused.stderr and refused.stderr.count("\n") == 1
