"""Planned memory: what PEFT trains and autograd keeps is what the formulas say; sharding only shrinks."""

import pytest

from launcher import activations, memory, targets
from launcher.architecture import read, read_file
from launcher.catalogue import card
from launcher.config import Adapter, Config, Quant
from tests.support.share import first

METHODS = ["lora", "qlora", "ia3", "prefix"]
ROWS, LENGTH = 2, 50


def adapter(method, **options):
    return Adapter(method=method, **({"start": "random"} if method == "prefix" else {}), **options)


def configured(chosen, **sections):
    quant = Quant(bits=4) if chosen.method == "qlora" else Quant()
    return Config(adapter=chosen, quant=quant, **sections)


def attached(folder, chosen, dtype="fp32"):
    """A real trainee of this adapter, and its configuration."""
    from launcher import methods, models
    from launcher.loss import Trainee

    config = configured(chosen)
    base = models.load_base(folder, dtype, config.quant, "cpu")
    return Trainee(methods.attach(base, chosen)).train(), config


OPTIONS = [
    ("lora", {}), ("lora", {"r": 5}), ("lora", {"dora": True}), ("lora", {"dora": True, "r": 3}), ("lora", {"dropout": 0.1}),
    ("qlora", {"r": 64}), ("ia3", {}), ("prefix", {}), ("prefix", {"num_tokens": 7}), ("prefix", {"projection": True}),
]  # fmt: skip
TARGETS = {
    "llama": [("q_proj",), ("self_attn.o_proj", "down_proj"), ("layers.1.mlp.up_proj",)],
    "gpt2": [("c_attn",), ("mlp.c_proj",), ("c_proj",), ("h.0.attn.c_proj", "c_fc")],
}


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=str)
def test_trained_parameters_are_those_of_peft(tiny, method, options):
    from launcher.methods import trainable

    chosen = adapter(method, **options)
    trainee, _ = attached(tiny, chosen)
    assert targets.num_trained(chosen, read_file(tiny)) == sum(p.numel() for p in trainable(trainee).values())


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_targets_are_matched_as_peft_matches_them(tiny, method):
    from launcher.methods import trainable

    architecture = read_file(tiny)
    for names in TARGETS[architecture.family]:
        chosen = adapter(method, targets=names)
        trainee, _ = attached(tiny, chosen)
        assert targets.num_trained(chosen, architecture) == sum(p.numel() for p in trainable(trainee).values()), names


def test_feedforward_is_what_ia3_is_told(tiny_llama):
    from launcher.methods import trainable

    chosen = adapter("ia3", feedforward=("up_proj", "down_proj"))
    trainee, _ = attached(tiny_llama, chosen)
    assert targets.num_trained(chosen, read_file(tiny_llama)) == sum(p.numel() for p in trainable(trainee).values())


def kept(trainee, dtype, monkeypatch, *, is_padded):
    """Bytes that autograd and the prefix's cache keep of a forward pass, without parameters and the head's logits."""
    import torch

    from launcher import loss, methods

    caches = []
    monkeypatch.setattr(loss, "prefix_cache", lambda *args: caches.append(methods.prefix_cache(*args)) or caches[-1])

    own = {p.untyped_storage().data_ptr() for p in (*trainee.parameters(), *trainee.buffers())}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own and tensor.shape[-1:] != (600,):
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 600, (ROWS, LENGTH))
    documents, trained = torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)
    trained[:, 0] = False
    if is_padded:
        documents[0, -1], trained[0, -1] = 0, False
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
    ):
        assert trainee(ids, documents, trained).requires_grad
    for layer in caches[0].layers if caches[0] else ():
        keep(layer.keys), keep(layer.values)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("dtype", first(1, ["fp32", "bf16"]))
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("method", "options"), [*((m, {}) for m in METHODS), ("lora", {"dropout": 0.1}), ("lora", {"r": 64})], ids=str
)
def test_activations_are_what_autograd_keeps(tiny, method, options, is_padded, dtype, monkeypatch):
    chosen = adapter(method, **options)
    trainee, config = attached(tiny, chosen, dtype)
    planned = estimate(config, read_file(tiny), dtype=dtype, has_mask=is_padded).activations
    assert planned == pytest.approx(kept(trainee, dtype, monkeypatch, is_padded=is_padded), rel=0.15)


def estimate(config, architecture, **options):
    defaults = {"micro": ROWS, "length": LENGTH, "dtype": "fp32", "on_gpu": False}
    return memory.estimate(config, architecture, **{**defaults, **options})


LLAMA = read(card("llama-7b").config)
GPUS = {"world": 4, "micro": 2, "length": 1024, "dtype": "bf16", "on_gpu": True}


def test_four_bits_are_a_quarter_of_sixteen():
    config = configured(adapter("qlora"))
    full = LLAMA.num_parameters * 2
    # 3.5 GB of weights, 0.1 GB of constants, 0.5 GB of embedding and head.
    assert memory.frozen_bytes(config, LLAMA, 2) / full == pytest.approx(0.288, abs=0.005)
    assert memory.frozen_bytes(configured(adapter("lora")), LLAMA, 2) == full


def test_single_quantisation_costs_more():
    config = configured(adapter("qlora"))
    single = config.model_copy(update={"quant": Quant(bits=4, double=False)})
    per_weight = (memory.frozen_bytes(single, LLAMA, 2) - memory.frozen_bytes(config, LLAMA, 2)) / LLAMA.num_linear
    # arXiv:2305.14314, section 3: "a reduction of 0.373 bits per parameter".
    assert per_weight * 8 == pytest.approx(0.373, abs=0.001)


def test_each_stage_shrinks_what_it_shards():
    config = configured(adapter("lora"))
    stages = [memory.estimate(config, LLAMA, stage=s, is_sharded_engine=True, **GPUS) for s in range(4)]
    offloaded = memory.estimate(config, LLAMA, stage=3, is_sharded_engine=True, is_offloaded=True, **GPUS)
    totals = [m.total for m in (*stages, offloaded)]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 5
    assert stages[1].moments * 4 == stages[0].moments and stages[1].gradients == stages[0].gradients
    assert stages[2].gradients * 4 == stages[1].gradients and stages[2].weights == stages[1].weights
    assert stages[3].weights < stages[2].weights
    assert offloaded.host == LLAMA.num_parameters * 2 // 4 and stages[3].host == 0


def test_one_process_gains_nothing_from_sharding():
    config = configured(adapter("lora"))
    alone = {**GPUS, "world": 1}
    plain = memory.estimate(config, LLAMA, **alone)
    zero3 = memory.estimate(config, LLAMA, stage=3, is_sharded_engine=True, **alone)
    assert zero3.weights == plain.weights and zero3.moments == plain.moments


def test_more_tokens_cost_more_and_checkpointing_costs_less():
    config = configured(adapter("lora"))
    totals = [memory.estimate(config, LLAMA, **{**GPUS, "micro": micro}).total for micro in (1, 2, 4, 8)]
    assert totals == sorted(set(totals))
    checkpointed = configured(adapter("lora"), model={"gradient_checkpointing": True})
    less, more = (memory.estimate(c, LLAMA, **GPUS).activations for c in (checkpointed, config))
    assert less < more / 10


def test_a_total_is_the_sum_of_its_parts():
    found = memory.Memory(1, 2, 3, 4, 5, 6, 7, host=100)
    assert found.total == 28


def test_the_chunk_is_that_of_the_loss():
    from launcher import loss

    assert activations.CHUNK == loss.CHUNK
