"""Hub datasets, read by the real `datasets` from a hub of our own in another process; every failure is one line."""

import json
import socket

import pytest

from tests.hub_server import COMMIT, TOKEN, serve
from tests.running import run_python

# `datasets` looks at the environment when it is imported, so a process of its own asks under each; what it shares with the others
# is imported before. Each of the given data options is read in turn; a list of words is a command.
ASK = """
import contextlib, io, json, os, sys
import pandas, pyarrow.dataset, pyarrow.parquet
from launcher import data
from launcher.__main__ import main
from launcher.config import Data
from launcher.errors import UserError, run_main
from launcher.variables import is_hub_data

def read(options):
    assert is_hub_data(options["source"])
    try:
        splits = data.read(Data(**options))
        return [len(splits.train), len(splits.held_out), splits.shapes, splits.left_out, splits.train[0]]
    except UserError as error:
        return list(error.faults)

def command(words):
    out, err, sys.argv[1:] = io.StringIO(), io.StringIO(), words
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_main(main)
    except SystemExit as end:
        return [end.code, out.getvalue(), err.getvalue()]

for environment, questions in json.loads(sys.argv[1]):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    assert not {"datasets", "huggingface_hub"} & set(sys.modules)
    os.environ.update(environment)
    told = {name: command(it) if isinstance(it, list) else read(it) for name, it in questions.items()}
    print(json.dumps({**told, "torch": "torch" in sys.modules}), flush=True)
    os._exit(0)
"""
NEEDS_NONE = "check the network, or try DATA=cafe, which needs none"
FAULTS = {
    "no such dataset": (
        {"source": "org/nope"},
        "no such file or folder here and no such dataset on the hub (if it is private, export HUGGINGFACE_TOKEN=...); "
        "check its name, or try DATA=cafe",
    ),
    "private": (
        {"source": "org/private"},
        "no such file or folder here and no such dataset on the hub (if it is private",
    ),
    "gated": (
        {"source": "org/gated"},
        "it is gated; accept its terms on huggingface.co/datasets/org/gated, then: export",
    ),
    "rejected": ({"source": "org/rejected"}, "the hub rejects this token; renew it and export HUGGINGFACE_TOKEN=..."),
    "busy": ({"source": "org/busy"}, f"it is not on this machine and the hub cannot be reached; {NEEDS_NONE}"),
    "no such split": (
        {"source": "org/orders", "split": "dev"},
        "no split dev; try data.split=train, the splits are: train, test",
    ),
    "not a split": ({"source": "org/orders", "split": "train[:x]"}, "data.split=train[:x] is no split; try data.split"),
    "no such subset": (
        {"source": "org/two", "subset": "fr"},
        "no subset fr; try data.subset=en, the subsets are: en, es",
    ),
    "several subsets": ({"source": "org/two"}, "it has several subsets; try data.subset=en, the subsets are: en, es"),
    "no such revision": ({"source": "org/orders", "revision": "v2"}, "no revision v2; try data.revision=main"),
    "not JSON": ({"source": "org/broken"}, "its files cannot be read (JSON parse error: Missing a name"),
    "no known column": ({"source": "org/pictures"}, "no known shape (keys: 'url'); name them messages, conversations"),
    "no data": ({"source": "org/empty"}, "no data files in it; look at huggingface.co/datasets/org/empty"),
    "not a hub id": ({"source": "org/na--me"}, "not a hub id; it is written org/name"),
}
GOOD = {
    "all": ({"source": "org/orders"}, [18, 2]),
    "a split": ({"source": "org/orders", "split": "test"}, [9, 1]),
    "part of a split": ({"source": "org/orders", "split": "train[:5]"}, [4, 1]),
    "a revision": ({"source": "org/orders", "revision": "v1"}, [18, 2]),
    "a subset": ({"source": "org/two", "subset": "es"}, [18, 2]),
}
SKIPPED = {"source": "org/faulty", "on_error": "skip"}


HERE = {
    "here": {"source": "org/orders"},
    "this commit": {"source": "org/orders", "revision": COMMIT},
    "a tag": {"source": "org/orders", "revision": "v1"},
    "not here": {"source": "org/other"},
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """What is told with a hub, with a token for it, and then without the hub: where it cannot be reached, where none is wanted."""
    home = tmp_path_factory.mktemp("home")
    server = serve()
    questions = {name: options for name, (options, _) in {**FAULTS, **GOOD}.items()}
    questions |= {"skipped": SKIPPED, "stopped": {"source": "org/faulty"}}
    questions["a command"] = ["plan", "DATA=org/orders", "data.split=dev"]
    with socket.socket() as taken:
        # Bound and not listening: whoever connects is refused at once.
        taken.bind(("127.0.0.1", 0))
        hub, nowhere = (f"http://127.0.0.1:{port}" for port in (server.server_port, taken.getsockname()[1]))
        rounds = [
            ({"HF_ENDPOINT": hub}, questions),
            ({"HF_ENDPOINT": hub, "HUGGINGFACE_TOKEN": TOKEN}, {"private": {"source": "org/private"}}),
            ({"HF_ENDPOINT": nowhere}, HERE),
            ({"HF_ENDPOINT": nowhere, "HF_HUB_OFFLINE": "1"}, HERE),
        ]
        done = run_python(
            "-c", ASK, json.dumps(rounds),
            env={
                "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HUGGINGFACE_TOKEN": "", "HF_TOKEN": "",
                "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "OPENBLAS_NUM_THREADS": "1",
            },
        )  # fmt: skip
    server.shutdown()
    server.server_close()
    # Nothing else may reach the screen.
    assert (done.returncode, done.stderr) == (0, "")
    return dict(zip(("hub", "token", "nowhere", "offline"), map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture
def told(asked):
    return asked["hub"]


@pytest.mark.parametrize("name", GOOD)
def test_a_hub_dataset_is_read(told, name):
    assert told[name][:3] == [*GOOD[name][1], {"prompt-completion": sum(GOOD[name][1])}]
    assert told[name][4][0]["content"][0] == ("p" if name == "a subset" else "q")


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_is_one_line(told, name):
    options, words = FAULTS[name]
    (fault,) = told[name]
    assert fault.startswith(f"DATA={options['source']}: {words}")
    assert "\n" not in fault


def test_faulty_rows_are_known_by_their_number(told):
    faults = [f'org/faulty:row {n}: "completion" is empty; write some text, or remove it' for n in (21, 22)]
    assert told["stopped"] == faults
    assert told["skipped"][:4] == [18, 2, {"prompt-completion": 20}, faults]


def test_torch_is_not_loaded(told):
    assert told["torch"] is False


def test_the_token_opens_what_is_private(asked):
    assert asked["token"]["private"][:2] == [18, 2]


def test_without_the_hub_what_is_here_is_used(asked):
    told, offline = asked["nowhere"], asked["offline"]
    assert told["here"][:2] == told["this commit"][:2] == offline["here"][:2] == [18, 2]
    gone = f"is not on this machine and the hub cannot be reached; {NEEDS_NONE}"
    assert told["not here"] == [f"DATA=org/other: it {gone}"]
    assert told["a tag"] == [f"DATA=org/orders: revision v1 {gone}"]
    unset = "it is not on this machine and HF_HUB_OFFLINE is set; unset it, or try DATA=cafe, which needs no network"
    assert offline["not here"] == [f"DATA=org/other: {unset}"]


def test_the_command_ends_with_2(told):
    fault = "error: DATA=org/orders: no split dev; try data.split=train, the splits are: train, test\n"
    assert told["a command"] == [2, "", fault]
