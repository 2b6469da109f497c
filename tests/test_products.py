"""Every way of multiplying gives the same product, and adapters come and go without moving one another."""

import random

import pytest
import torch
from torch import nn

from serve.layers import AdaptedLinear, Batch, Part
from serve.products import LEAST_BYTES, SIZES, PackedLinear, Products, TurnedLinear


@pytest.mark.parametrize("num_rows", [1, 2, 3, 17, 63, 64, 130])
@pytest.mark.parametrize("has_bias", [True, False])
def test_few_rows_in_another_order_are_the_same_product(num_rows, has_bias):
    layer = nn.Linear(48, 80, bias=has_bias)
    x = torch.randn(num_rows, 1, 48)
    with torch.inference_mode():
        ours = Products(turned=SIZES).quicker(layer)
        assert type(ours) is TurnedLinear
        assert torch.allclose(ours(x), layer(x), atol=1e-6) and ours(x).is_contiguous()


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor cannot: no AVX-512 (docs/benchmarks.md)"
)
@pytest.mark.parametrize("num_rows", [1, 3, 130])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_packed_weight_is_the_same_weight(num_rows, has_bias):
    layer = nn.Linear(48, 80, bias=has_bias).bfloat16()
    x = torch.randn(num_rows, 1, 48).bfloat16()
    with torch.inference_mode():
        ours = Products(is_packed=True).quicker(layer)
        assert type(ours) is PackedLinear
        assert torch.equal(ours.weight, layer.weight)
        assert torch.allclose(ours(x).float(), layer(x).float(), atol=1e-2, rtol=1e-2)


def test_what_is_no_plain_layer_stays_as_it_is():
    class Other(nn.Linear):
        pass

    for layer in (Other(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, device="meta")):
        assert Products(turned=SIZES, is_packed=True).quicker(layer) is layer
    plain = nn.Linear(4, 4)
    assert Products().quicker(plain) is plain


def test_what_is_measured_is_the_dtype_of_the_layers_and_only_of_a_model_that_is_large_enough():
    side = int((LEAST_BYTES / 2) ** 0.5) + 1
    with torch.inference_mode():
        large = [nn.Linear(side, side, bias=False).to(dtype) for dtype in (torch.bfloat16, torch.float32)]
    for layer in large:
        products = Products()
        products.measure([layer])
        assert not (products.turned and products.is_packed)
        assert not products.turned or layer.weight.dtype is torch.float32
        assert not products.is_packed or layer.weight.dtype is torch.bfloat16
    small = Products()
    small.measure([nn.Linear(8, 8)])
    assert not small.turned and not small.is_packed


def part(seed, rank, kind):
    random_ = torch.Generator().manual_seed(seed)
    if kind == "lora":
        return Part(a=torch.randn(rank, 12, generator=random_), b=torch.randn(rank, 20, generator=random_))
    return Part(in_scale=torch.randn(12, generator=random_), out_scale=torch.randn(20, generator=random_))


def expected(base, x, p):
    y = base(x if p.in_scale is None else x * p.in_scale)
    y = y if p.out_scale is None else y * p.out_scale
    return y if p.a is None else y + x @ p.a.t() @ p.b


def test_adapters_come_and_go_and_none_disturbs_another():
    chosen, base, batch = random.Random(0), nn.Linear(12, 20), Batch()
    layer, served = AdaptedLinear(base, batch), {}
    x = torch.randn(40, 1, 12)
    for seed in range(60):
        if served and chosen.random() < 0.4:
            index = chosen.choice(list(served))
            layer.drop(index)
            del served[index]
        else:
            index = next(i for i in range(1, 99) if i not in served)
            rank, kind = chosen.choice((2, 4, 8)), chosen.choice(("lora", "lora", "ia3"))
            served[index] = part(seed, rank, kind)
            layer.put(index, part(seed, rank, kind))
        who = torch.tensor([chosen.choice([0, *served]) for _ in x])
        with torch.inference_mode():
            wanted = torch.stack(
                [expected(base, row, served.get(int(i), Part())) for row, i in zip(x, who, strict=True)]
            )
            batch.bind(who, None)
            assert torch.allclose(layer(x), wanted, atol=1e-4)
            for index in served:
                batch.bind(torch.full((40,), index), index)
                assert torch.allclose(layer(x), expected(base, x, served[index]), atol=1e-4)


def test_the_place_of_one_that_left_is_taken_by_the_next():
    layer = AdaptedLinear(nn.Linear(12, 20), Batch())
    for index in (1, 2, 3):
        layer.put(index, part(index, 4, "lora"))
    size = len(layer._a)
    layer.drop(2)
    layer.put(2, part(9, 2, "lora"))
    layer.put(4, part(10, 2, "lora"))
    assert len(layer._a) == size == 12
    layer.put(5, part(11, 2, "lora"))
    assert len(layer._a) == 15
    layer.put(6, part(12, 1, "lora"))
    assert len(layer._a) == 15
