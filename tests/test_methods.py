"""Every method on every architecture: it learns, what was saved is what was trained, and the tuned model stops by itself."""

import json

import pytest
import torch

from launcher import cafe, data, methods, models
from launcher.catalogue import card
from launcher.config import Adapter, Config, Data
from launcher.errors import UserError
from launcher.models import load_tokenizer
from launcher.report import read_metrics
from serve.engine import Sampling
from tests.conftest import CHATML, LEARN, write_tiny
from tests.derived_runs import derive
from tests.running import run_python, train
from tests.slot_answers import answer, engine

FAMILIES = ("llama", "gpt2")
TEMPLATES = {"chatml": CHATML, "gpt-2": card("gpt-2").template, "llama-7b": card("llama-7b").template}
TEMPLATE_OF = {"llama": "chatml", "gpt2": "gpt-2"}
NUM_ASKED = 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", LEARN)
def test_it_overfits_and_what_was_saved_is_what_was_trained(trained_run, family, method):
    run = trained_run(method, family)
    losses = [record["loss"] for record in read_metrics(run)]
    assert losses[-1] < 0.2 * losses[0]
    manifest = json.loads((run / "run.json").read_text())
    # The same base, the same file, the same forward pass.
    assert manifest["results"]["reload_difference"] < 1e-6
    assert manifest["config"]["adapter"]["method"] == method


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", LEARN)
def test_the_engine_answers_what_was_learned_and_stops_by_itself(trained_run, family, method):
    run = trained_run(method, family)
    learned = data.read(Data(limit=2)).train[:NUM_ASKED]
    ours = engine([run])
    key = ours.info.adapters[0].key
    tokens, _ = answer(ours, {i: (ours.prompt_ids(m[:-1]), key, Sampling()) for i, m in enumerate(learned)}, 81)
    answers = [tokens[slot] for slot in sorted(tokens)]
    stops = ours.info.stop_ids
    assert all(any(token in stops for token in ids) for ids in answers)
    said = [
        load_tokenizer(run / "tokenizer").decode(ids[: next(i for i, token in enumerate(ids) if token in stops)])
        for ids in answers
    ]
    assert [text.strip() for text in said] == [m[-1]["content"] for m in learned]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", LEARN)
def test_the_engine_computes_the_logits_of_stock_peft(trained_run, family, method):
    """Prefill and decode of the slot engine against one plain forward pass of `PeftModel`, in every way to hold it."""
    from peft import PeftModel

    from launcher.reload import choose_hold

    run = trained_run(method, family)
    model = run.parent / "model"
    with models.quiet():
        quant = Config.model_validate(json.loads((run / "run.json").read_text())["config"]).quant
        stock = PeftModel.from_pretrained(models.load_base(model, "fp32", quant, "cpu"), str(run / "adapter")).eval()
    prompt = None
    for hold in ("adapters", choose_hold("auto", method)):
        ours = engine([run], hold)
        prompt = ours.prompt_ids(next(iter(cafe.examples("held_out")))["messages"][:1])
        tokens = answer(ours, {1: (prompt, ours.info.adapters[0].key, Sampling())}, 9)[0][1]
        with torch.no_grad():
            whole = stock(input_ids=torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert whole.argmax(-1).tolist() == tokens


def conversations():
    """Two hundred: orders in two languages, with several turns, with system turns, with all sorts of characters."""
    orders = [e["messages"] for e in cafe.examples("held_out")]
    for i in range(200):
        talk = [turn for j in range(1 + i % 3) for turn in orders[(i + 7 * j) % 200]]
        if i % 4 == 0:
            talk = [{"role": "system", "content": "Sé breve. 請簡短 🙂\n\nJSON only."}, *talk]
        if i % 5 == 0:
            talk[-1] = {"role": "assistant", "content": f"  ¿Algo más?\t<|im_start|>user\n№{i} "}
        yield talk


@pytest.fixture(scope="module")
def llama_7b_run(tmp_path_factory):
    """A lora run with the one template that no trained run has."""
    folder = tmp_path_factory.mktemp("llama-7b")
    done = train(write_tiny("llama", folder / "model", TEMPLATES["llama-7b"]), folder / "lora")
    assert done.returncode == 0, done.stderr
    return folder / "lora"


@pytest.fixture
def template_run(request, trained_run, method, template, tmp_path):
    """A run of this method with this template."""
    for family, own in TEMPLATE_OF.items():
        if own == template:
            return trained_run(method, family)
    return derive(request.getfixturevalue("llama_7b_run"), tmp_path / "run", 1, method=method)


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("method", LEARN)
def test_the_daemon_reads_the_ids_that_training_reads(template_run, template):
    from launcher.chat import render

    run = template_run
    base = json.loads((run / "run.json").read_text())["base"]["id"]
    trained_with = load_tokenizer(base)
    ours = engine([run])
    assert trained_with.chat_template == TEMPLATES[template]
    num_compared = 0
    for talk in conversations():
        trained = render(trained_with, talk)
        for turn, message in enumerate(talk):
            if message["role"] == "assistant":
                served = ours.prompt_ids(talk[:turn])
                assert trained.ids[: len(served)] == served
                assert trained.trained[len(served)]
                assert not trained.trained[len(served) - 1]
                num_compared += 1
    assert num_compared > 200


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"method": "prefix", "r": 4}, "adapter.r: not an option of prefix; try PEFT=lora or qlora"),
        ({"method": "ia3", "num_tokens": 4}, "adapter.num_tokens: not an option of ia3; try PEFT=prefix"),
        ({"method": "lora", "feedforward": ("down_proj",)}, "not an option of lora; try PEFT=ia3"),
        ({"method": "prefix", "projection": True}, "try adapter.start=random"),
    ],
)
def test_an_option_of_another_method_is_refused(overrides, says):
    from launcher.compose import check

    with pytest.raises(UserError, match=says):
        check({"adapter": overrides})


def test_combinations_that_peft_cannot_do_are_refused_before_anything_loads(tmp_path):
    done = run_python(
        "-c",
        "import sys; from launcher.compose import load; from launcher.variables import parse\n"
        "try: load(parse(['PEFT=prefix', 'model.gradient_checkpointing=true']))\n"
        "except Exception as e: print(e, 'torch' in sys.modules)",
    )
    assert "recompute activations behind a prefix; try PEFT=lora" in done.stdout
    assert done.stdout.strip().endswith("False")
    for args in (["PEFT=ia3", "optim.lora_plus=4"], ["PEFT=prefix", "adapter.dora=true"]):
        done = run_python("-m", "launcher", "train", *args, f"RUN={tmp_path}/x")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "try PEFT=lora" in done.stderr


def test_each_option_of_lora_takes_effect(tiny):
    plain, rs, dora = (
        methods.attach(models.load_base(tiny, "fp32", Config().quant, "cpu"), Adapter(**options))
        for options in ({}, {"rslora": True}, {"dora": True})
    )

    def scaling(model):
        return next(m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict))

    assert (scaling(plain), scaling(rs)) == (2.0, 8.0)
    assert any("magnitude" in name for name in methods.trainable(dora))
    assert not any("magnitude" in name for name in methods.trainable(plain))


def test_ia3_scales_what_it_should(tiny):
    model = methods.attach(models.load_base(tiny, "fp32", Config().quant, "cpu"), Adapter(method="ia3"))
    at_input = {
        name.split(".ia3_l")[0].rsplit(".", 2)[-1] for name, p in methods.trainable(model).items() if p.shape[0] == 1
    }
    assert at_input <= {"down_proj", "c_proj"}
    assert all(torch.equal(p, torch.ones_like(p)) for p in methods.trainable(model).values())
    with pytest.raises(UserError, match="no module is named q_prj; choose from: all-linear"):
        methods.attach(models.load_base(tiny, "fp32", Config().quant, "cpu"), Adapter(method="ia3", targets=("q_prj",)))


def test_a_prefix_starts_from_the_keys_and_values_of_the_first_examples(tiny):
    from launcher.batches import collate, each_alone
    from launcher.loss import Trainee
    from tests.test_loss import some_examples

    examples = some_examples(3, 20)
    base = models.load_base(tiny, "fp32", Config().quant, "cpu")
    model = methods.attach(base, Adapter(method="prefix", num_tokens=12))
    (prefix,) = methods.trainable(model).values()
    prefix.data.copy_(methods.prefix_from_text(model, examples, 12, model.device))
    continued = collate(each_alone([examples[1]]))
    # As if the base had read the first 12 tokens of the first example before.
    first, second = torch.tensor([examples[0].ids[:12].tolist()]), continued["input_ids"]
    with torch.no_grad():
        logits = base(input_ids=torch.cat([first, second], dim=1)).logits[:, 12:-1].float()
    losses = torch.nn.functional.cross_entropy(logits[0], second[0, 1:], reduction="none")
    expected = losses[continued["trained"][0, 1:]].sum()
    torch.testing.assert_close(Trainee(model)(**continued), expected, rtol=1e-4, atol=1e-3)
    random = methods.attach(base, Adapter(method="prefix", num_tokens=12, start="random", projection=True))
    assert any("transform" in name for name in methods.trainable(random))


def test_lora_plus_lets_b_learn_faster(tiny):
    from launcher.job import make_optimizer

    model = methods.attach(models.load_base(tiny, "fp32", Config().quant, "cpu"), Adapter())
    plus = make_optimizer(Config.model_validate({"optim": {"lora_plus": 8.0}}), model)
    assert [group["ratio"] for group in plus.param_groups] == [1.0, 8.0]
    fast = {id(p) for p in plus.param_groups[1]["params"]}
    assert all(("lora_B" in name) == (id(p) in fast) for name, p in methods.trainable(model).items())
    assert len(make_optimizer(Config(), model).param_groups) == 1
