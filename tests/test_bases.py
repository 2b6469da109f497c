"""What is loaded as a base: all of it, or one clear line."""

import json

import pytest
from safetensors.torch import load_file, save_file

from launcher import models
from launcher.config import Quant
from launcher.errors import UserError
from launcher.variables import ROOT
from tests.conftest import write_tiny
from tests.running import run_python

# Counts, whenever a base is read, how many parameters of the one before it are still in memory.
COUNT = """
import os
if os.environ.get("RANK") == "0":
    import weakref
    from launcher import models
    load, before = models.load_base, []
    def counted(*args, **rest):
        with open({file!r}, "a") as file:
            print(len(before), sum(reference() is not None for reference in before), file=file)
        base = load(*args, **rest)
        before[:] = [weakref.ref(parameter) for parameter in base.parameters()]
        return base
    models.load_base = counted
"""
BITS = {"whole": Quant(), "4bit": Quant(bits=4)}


def rewrite(model, change):
    """Change the tensors in the file of a model folder."""
    file = model / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize("quant", BITS.values(), ids=BITS)
def test_weights_that_are_in_no_file_are_refused_and_named(tmp_path, quant):
    model = write_tiny("llama", tmp_path)
    models.load_base(model, "fp32", quant, "cpu")
    rewrite(model, without("layers.1.mlp"))
    with pytest.raises(UserError, match=r"lack model.layers.1.mlp.down_proj.weight and 2 more; try"):
        models.load_base(model, "fp32", quant, "cpu")


def test_tied_weights_and_what_a_model_computes_for_itself_need_not_be_in_a_file(tmp_path):
    llama, gpt2 = (write_tiny(family, tmp_path / family) for family in ("llama", "gpt2"))
    assert "lm_head.weight" not in load_file(llama / "model.safetensors")
    # Old files hold the causal mask of each layer, and the rotary frequencies.
    rewrite(gpt2, lambda t: {**t, "transformer.h.0.attn.bias": t["transformer.h.0.ln_1.bias"].clone()})
    rewrite(llama, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": t["model.norm.weight"].clone()})
    for model in (llama, gpt2):
        models.load_base(model, "fp32", Quant(), "cpu")
    # Either name of a tied pair will do, but one must be there.
    rewrite(llama, lambda t: {"lm_head.weight" if "embed" in name else name: tensor for name, tensor in t.items()})
    models.load_base(llama, "fp32", Quant(), "cpu")
    rewrite(llama, without("lm_head"))
    with pytest.raises(UserError, match=r"lack model.embed_tokens.weight; try"):
        models.load_base(llama, "fp32", Quant(), "cpu")


def edit_config(model, **changes):
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut_short(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BROKEN = {
    "weights": (cut_short, "the base cannot be loaded"),
    "shapes": (
        lambda m: edit_config(m, intermediate_size=96),
        "have another shape of model.layers.0.mlp.down_proj.weight",
    ),
    "tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "the tokenizer cannot be loaded"),
    "family": (lambda m: edit_config(m, model_type="zzz"), "the configuration cannot be loaded"),
    "configuration": (lambda m: (m / "config.json").write_text("{"), "the configuration cannot be loaded"),
}


@pytest.mark.parametrize(("damage", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model_folder_is_told_in_one_line(tmp_path, damage, says):
    model = write_tiny("llama", tmp_path)
    damage(model)
    with pytest.raises(UserError) as error:
        models.read_architecture(model)
        models.load_tokenizer(model)
        models.load_base(model, "fp32", Quant(), "cpu")
    (line,) = str(error.value).splitlines()
    assert says in line
    assert "; try " in line


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "zero3"])
def test_no_training_begins_on_a_base_with_gaps(tmp_path, strategy):
    model = write_tiny("llama", tmp_path / "model")
    rewrite(model, without("layers.1.mlp"))
    done = run_python("-m", "launcher", "train", f"MODEL={model}", f"RUN={tmp_path}/run", f"STRATEGY={strategy}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "lack model.layers.1.mlp.down_proj.weight and 2 more" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_the_trained_base_is_gone_before_the_fresh_one_is_read(tiny_llama, orders, tmp_path, strategy):
    (tmp_path / "sitecustomize.py").write_text(COUNT.format(file=str(tmp_path / "counts")))
    done = run_python(
        "-m", "launcher", "train", f"MODEL={tiny_llama}", f"RUN={tmp_path}/run", f"STRATEGY={strategy}", "NGPU=2",
        f"DATA={orders}", "batch.size=8", "optim.max_steps=1", "eval.examples=1", "eval.answers=0",
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (line.split() for line in (tmp_path / "counts").read_text().splitlines())
    assert first == ["0", "0"]
    assert second == ["20", "0"]
