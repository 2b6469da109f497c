"""Checkpoints: written whole, verified before use, exact for every optimizer."""

import pytest
import torch

from launcher import checkpoint, gate
from launcher.errors import IntegrityError, UserError


def train(optimizer, parameters, steps, first=0):
    for step in range(first, steps):
        torch.manual_seed(step)
        sum((p * torch.randn(p.shape)).pow(2).sum() for p in parameters.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def fresh(kind):
    torch.manual_seed(0)
    parameters = {"a": torch.nn.Parameter(torch.randn(64, 80)), "b": torch.nn.Parameter(torch.randn(8))}
    if kind == "paged_adamw":
        from bitsandbytes.optim import PagedAdamW32bit

        return parameters, PagedAdamW32bit(parameters.values(), lr=0.1)
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["adamw", "paged_adamw"])
def test_a_resumed_run_is_bit_identical(kind, tmp_path):
    parameters, optimizer = fresh(kind)
    train(optimizer, parameters, 3)
    state = checkpoint.gather(parameters, optimizer)
    checkpoint.write(tmp_path, state, {}, step=3, position=48, keep=2)
    train(optimizer, parameters, 6, first=3)

    again, other = fresh(kind)
    found, passed_over = checkpoint.newest(tmp_path)
    assert (found.step, found.position, passed_over) == (3, 48, [])
    checkpoint.put_back(checkpoint.read(found), again, other, step=3)
    train(other, again, 6, first=3)
    assert all(torch.equal(again[name], parameters[name]) for name in parameters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["adamw", "paged_adamw"])
def test_a_parameter_that_the_loss_passes_by_is_named(kind):
    parameters, optimizer = fresh(kind)
    train(optimizer, {"a": parameters["a"]}, 2)
    with pytest.raises(UserError, match="b has never had a gradient"):
        checkpoint.gather(parameters, optimizer)


def test_the_newest_that_verifies_is_taken_and_the_others_named(tmp_path):
    state = {"param/a": torch.arange(10.0), "exp_avg_sq/a": torch.ones(10)}
    for step in (1, 2, 3, 4):
        checkpoint.write(tmp_path, state, {}, step=step, position=step, keep=4)
    root = tmp_path / "checkpoints"
    damaged = root / "step-00004" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    (root / "step-00003" / "manifest.json").write_text("{")
    (root / "step-00009.part").mkdir()
    found, passed_over = checkpoint.newest(tmp_path)
    assert found.step == 2
    assert ["step-00004" in passed_over[0], "step-00003" in passed_over[1]] == [True, True]


def test_only_the_newest_are_kept(tmp_path):
    state = {"param/a": torch.zeros(1), "exp_avg_sq/a": torch.ones(1)}
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, state, {}, step=step, position=step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00002", "step-00003"]
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_of_a_later_step_takes_no_place(tmp_path, keep):
    state = {"param/a": torch.zeros(1), "exp_avg_sq/a": torch.ones(1)}
    checkpoint.write(tmp_path, state, {}, step=50, position=50, keep=2)
    # It would be the best one too.
    damaged = checkpoint.write(tmp_path, state, {}, step=100, position=100, keep=2, loss=0.1)
    (damaged / "state.safetensors").write_bytes(b"")
    assert checkpoint.newest(tmp_path)[0].step == 50
    checkpoint.write(tmp_path, state, {}, step=70, position=70, keep=keep)
    assert checkpoint.newest(tmp_path)[0].step == 70
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00050", "step-00070"][-keep:]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: {**t, "param/a": torch.zeros(0)}, "param/a is empty"),
        (lambda t: {**t, "param/a": torch.full((4,), float("nan"))}, "param/a is not finite"),
        (lambda t: {"param/a": t["param/a"]}, "exp_avg_sq/a is missing"),
        (lambda t: {**t, "param/a": torch.zeros(4)}, "param/a has not changed since the start and 1 more"),
    ],
    ids=["empty", "nan", "missing", "unchanged"],
)
def test_a_damaged_save_is_noticed_and_the_one_before_it_kept(tmp_path, monkeypatch, damage, says):
    start = gate.digests({"param/a": torch.zeros(4)})
    state = {"param/a": torch.ones(4), "exp_avg_sq/a": torch.ones(4)}
    checkpoint.write(tmp_path, state, start, step=1, position=1, keep=2)
    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, file: save(damage(tensors), file))
    with pytest.raises(IntegrityError, match=says):
        checkpoint.write(tmp_path, state, start, step=2, position=2, keep=2)
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_a_parameter_without_a_gradient_may_stand_still_but_not_all_of_them():
    tensors = {
        "param/a": torch.zeros(4),
        "param/b": torch.ones(4),
        "exp_avg_sq/a": torch.zeros(4),
        "exp_avg_sq/b": torch.ones(4),
    }
    assert checkpoint.idle(tensors) == ["param/a"]
