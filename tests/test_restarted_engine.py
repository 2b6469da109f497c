"""A real engine that dies is started again as it was: what its words meant at first holds, whatever has come and gone since."""

import os
import shutil
import signal

import pytest

from serve.protocol import Kind
from tests.derived_runs import derive
from tests.serve_fixtures import RawClient, box, children, wait_until

__all__ = ["box"]


@pytest.mark.slow
def test_the_last_of_two_adapters_is_not_merged_into_its_base(trained_run, tmp_path, box):
    one = shutil.copytree(trained_run("lora", "llama"), tmp_path / "one")
    two = derive(one, tmp_path / "two", seed=1, method="lora", r=4)
    daemon = box.start("daemon", f"RUNS={one} {two}", "serve.context=256", "serve.slots=2")
    assert daemon.stdout is not None and any(line.startswith("ready: ") for line in daemon.stdout)

    def served() -> tuple[str, list[str]]:
        status = client.status()
        return status["info"].get("hold"), [key.partition("@")[0] for key in status["adapters"]]

    with RawClient(box.record("one")) as client:
        assert served() == ("adapters", ["one", "two", "base"])
        assert client.ask(Kind.UNLOAD, adapter="one", admin=box.record("one").admin).kind is Kind.ADAPTERS
        (engine,) = children(daemon.pid)
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: client.status()["engines"][0]["pid"] != engine)
        wait_until(lambda: client.status()["engines"][0]["state"] == "ready")
        assert served() == ("adapters", ["two", "base"])
