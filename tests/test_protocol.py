"""Frames, bodies and submissions: what is taken and what is refused."""

import ast
from pathlib import Path
from typing import Any

import msgpack
import pytest

from serve import submission
from serve.engine import Sampling
from serve.protocol import MAGIC, MAX_MESSAGE_BYTES, Code, Kind, Message, ProtocolError, decode, encode, error
from serve.submission import Submission

ID = bytes(range(16))
SERVE = Path(__file__).parent.parent / "serve"
BODIES: dict[Kind, dict[str, Any]] = {
    Kind.HELLO: {"proto": [1]},
    Kind.WELCOME: {"proto": 1, "epoch": "e", "session": b"s", "state": "ready", "info": {}, "limits": {}},
    Kind.PROGRESS: {"stage": "weights", "done": 1, "total": 2},
    Kind.READY: {"info": {}},
    Kind.SUBMIT: {"messages": [{"role": "user", "content": "¿qué?"}], "newer": "ignored"},
    Kind.ACCEPTED: {"position": 0, "prompt_tokens": 3, "adapter": "base", "max_tokens": 9},
    Kind.DELTA: {"n": 0, "text": "ñ", "tokens": 1},
    Kind.DONE: {"reason": "stop", "usage": {}, "timings": {}},
    Kind.ERROR: {"code": "E_ENGINE", "message": "m", "detail": {}, "retryable": True},
    Kind.CREDIT: {"count": 3},
    Kind.LOAD: {"run": "runs/x"},
    Kind.UNLOAD: {"adapter": "x"},
}


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_survives_the_wire(kind: Kind) -> None:
    message = Message(kind, ID, BODIES.get(kind, {}))
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID, b"\x80", b""], Code.BAD_REQUEST),
        ([b"CHT2", b"?", ID, b"\x80"], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID[:15], b"\x80"], Code.BAD_REQUEST),
        ([MAGIC, b"~", ID, b"\x80"], Code.UNSUPPORTED),
        ([MAGIC, b"", ID, b"\x80"], Code.UNSUPPORTED),
        ([MAGIC, b"?", ID, b""], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID, b"\x80\x80"], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID, b"\x90"], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID, b"\x81\x01\x02"], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID, msgpack.packb({"a": msgpack.ExtType(4, b"x")})], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID, msgpack.packb({"a": msgpack.Timestamp(1)})], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID, b"\x81\xa1a\xa2\xff\xff"], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID, b"\x81\xa1a" + b"\x91" * 5000], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID, b"\x81\xa1a\xdd\xff\xff\xff\xff"], Code.BAD_REQUEST),
        ([MAGIC, b"?", ID, bytes(MAX_MESSAGE_BYTES + 1)], Code.BAD_REQUEST),
        ([MAGIC, b"S", ID, b"\x80"], Code.BAD_REQUEST),
        ([MAGIC, b"C", ID, msgpack.packb({"count": True})], Code.BAD_REQUEST),
        ([MAGIC, b"C", ID, msgpack.packb({"count": "1"})], Code.BAD_REQUEST),
    ],
)
def test_anything_else_is_refused(frames: list[bytes], code: Code) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(frames)
    assert caught.value.code is code


def test_an_error_carries_its_counts() -> None:
    message = decode(encode(error(ID, Code.CONTEXT, "too long", have=9, need=10, max=8)))
    detail = {"have": 9, "need": 10, "max": 8}
    assert message.body == {"code": "E_CONTEXT", "message": "too long", "detail": detail, "retryable": False}
    assert error(ID, Code.QUEUE_FULL, "later").body["retryable"]


def test_a_submission_survives_the_wire() -> None:
    asked = Submission([{"role": "user", "content": "hi"}], Sampling(0.7, 40, 0.9, seed=7), 12, ("\n",), "x", 9)
    assert submission.parse(decode(encode(Message(Kind.SUBMIT, ID, asked.to_body()))).body, ID) == asked


def test_greedy_is_the_default() -> None:
    asked = submission.parse({"messages": [{"role": "user", "content": ""}]}, ID)
    assert asked.sampling == Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=None)
    assert asked.max_tokens is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (float("nan"), float("inf"), -1, "0.5", True, None, 101)],
        *[("top_p", value) for value in (0, -0.1, 1.1, float("nan"), "1")],
        *[("top_k", value) for value in (-1, 1.5, 2**40, True)],
        *[("seed", value) for value in (-1, 2**63, 0.5)],
        *[("min_p", value) for value in (-0.1, 1.1, float("nan"), True)],
        *[("repetition_penalty", value) for value in (0, -1, float("inf"), "1")],
        *[("stop", value) for value in ("x", [""], ["x" * 257], ["x"] * 17, [3])],
        *[("deadline_ms", value) for value in (0, -1, 1.5, 2**40)],
        *[("adapter", value) for value in (3, b"x", ["x"])],
        *[("max_tokens", value) for value in (0, -5, 1.5, True, "9")],
        *[("messages", value) for value in ([], ["hi"], [{"role": "user"}], [{"role": "root", "content": "x"}])],
        *[("messages", [{"role": "user", "content": value}]) for value in (None, 3, b"x", ["x"])],
        ("messages", [{"role": ["user"], "content": "x"}]),
    ],
)
def test_a_bad_field_is_named(name: str, value: Any) -> None:
    with pytest.raises(ProtocolError) as caught:
        submission.parse({"messages": [{"role": "user", "content": "x"}], name: value}, ID)
    assert caught.value.code is Code.BAD_REQUEST
    assert caught.value.request == ID
    assert "must be" in str(caught.value)


def test_nothing_in_serve_can_run_what_it_receives() -> None:
    forbidden = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"}
    calls = {"eval", "exec", "recv_pyobj", "send_pyobj", "globals", "__import__", "import_module"}
    for path in SERVE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None)}
                assert not names & forbidden, path
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", None) or (
                    node.func.attr if isinstance(node.func, ast.Attribute) else None
                )
                # `model.eval()` of torch runs nothing.
                is_method_eval = called == "eval" and isinstance(node.func, ast.Attribute)
                assert called not in calls or is_method_eval, f"{path}:{node.lineno}"
