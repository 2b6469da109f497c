"""The whole path on the real small model: train, serve, ask through the client, compare with stock PEFT."""

import asyncio
import json
import signal

import pytest
import torch

from launcher import cafe, models
from launcher.weights import cache_dir
from serve.client import connect
from serve.pieces import Delta
from tests.running import run_python
from tests.serve_fixtures import PATIENCE, box  # noqa: F401
from tests.slot_answers import engine

NUM_PROMPTS = 20
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def run(smollm2, tmp_path_factory):
    """A run of two steps, started as a user starts it: enough that the adapter says other things than the base."""
    folder = tmp_path_factory.mktemp("short")
    orders = [json.dumps(example) for example in list(cafe.examples("train"))[:9]]
    (folder / "orders.jsonl").write_text("\n".join(orders))
    done = run_python(
        "-m", "launcher", "train", f"DATA={folder / 'orders.jsonl'}", f"RUN={folder / 'run'}", "optim.lr=5e-3",
        "batch.size=4", "eval.answers=0", cold=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def questions():
    """The shortest orders."""
    asked = [example["messages"][:1] for example in cafe.examples("held_out")]
    return sorted(asked, key=lambda messages: len(messages[0]["content"]))[:NUM_PROMPTS]


@pytest.fixture(scope="module")
def expected(run, smollm2):
    """(text, number of prompt tokens) of each question, by the run as anybody would load it, with nothing of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with models.quiet():
        base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(run / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    said = [stock_answer(model, tokenizer, messages) for messages in questions()]
    with model.disable_adapter():
        assert stock_answer(model, tokenizer, questions()[0])[0] != said[0][0]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("hold", ["adapters", "merged"])
def test_the_daemon_says_what_stock_peft_says(run, expected, box, hold):  # noqa: F811
    # One of the two as a user starts it.
    is_cold = hold == "merged"
    words = (f"RUN={run}", f"HOLD={hold}", "DTYPE=fp32")
    daemon = box.start("daemon", *words, cold=is_cold, AFINAR_CACHE=str(cache_dir()))
    ready = daemon.stdout.readline()
    while ready and not ready.startswith("ready: "):
        ready = daemon.stdout.readline()
    assert ready, daemon.stderr.read()

    async def ask(record, messages):
        with await connect(record, lambda *_: None) as client:
            pieces = [piece async for piece in client.ask(messages, max_tokens=NUM_TOKENS)]
        text = "".join(piece.text for piece in pieces if isinstance(piece, Delta))
        return text, pieces[-1].usage["prompt_tokens"]

    async def ask_all():
        # All at once, so that they share the slots.
        return await asyncio.gather(*(ask(box.record(run.name), messages) for messages in questions()))

    assert asyncio.run(ask_all()) == expected


def stock_answer(model, tokenizer, messages):
    """Greedy `generate` on the template's own ids: (text, number of prompt tokens)."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
    prompt = ids["input_ids"].shape[1]
    return tokenizer.decode(out[0, prompt:], skip_special_tokens=True), prompt


@pytest.mark.slow
def test_the_client_sends_the_ids_that_were_trained(run, smollm2):
    from transformers import AutoTokenizer

    from launcher.chat import render

    ours = engine([run], "merged")
    stock_tokenizer, trained_with = (AutoTokenizer.from_pretrained(path) for path in (smollm2, run / "tokenizer"))
    for example in list(cafe.examples("held_out"))[:NUM_PROMPTS]:
        question = example["messages"][:1]
        served = ours.prompt_ids(question)
        written = stock_tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
        assert served == written["input_ids"]
        assert render(trained_with, example["messages"]).ids[: len(served)] == served


@pytest.mark.slow
def test_infer_answers_and_leaves_nothing_behind(run, box):  # noqa: F811
    infer = box.start("infer", f"RUN={run}", AFINAR_CACHE=str(cache_dir()))
    infer.stdin.write("Two lattes to go, please.")
    infer.stdin.close()
    # So short a training teaches to write JSON, not yet to stop.
    assert infer.stdout.read(8)
    infer.send_signal(signal.SIGINT)
    assert infer.wait(PATIENCE) == 5
    assert "\x1b" not in infer.stdout.read()
    assert box.left() == set()
