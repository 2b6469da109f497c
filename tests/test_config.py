"""The configuration: every shipped file loads, every option is read, every typo is caught."""

import ast

import pytest

from launcher.catalogue import card
from launcher.compose import check, load, options
from launcher.config import default_run_dir
from launcher.errors import UserError
from launcher.hardware import Hardware
from launcher.plan import plan
from launcher.variables import CONFIGS, ROOT, option_names, parse, shipped

LAPTOP = Hardware(num_gpus=0, num_cores=2, has_bf16=True)


@pytest.mark.parametrize("file", sorted((CONFIGS / "runs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_runs_load_and_plan(file):
    config = load(parse([str(file)]))
    processes = 1 if config.parallel.strategy in ("auto", "single") else 2
    assert plan(config, processes, LAPTOP, []).world == processes
    assert f"-m launcher.train {file.relative_to(ROOT)}" in file.read_text().splitlines()[0]


@pytest.mark.parametrize("method", shipped("peft"))
def test_shipped_methods_load(method):
    assert load(parse([f"PEFT={method}"])).adapter.method == method


@pytest.mark.parametrize("name", shipped("models"))
def test_shipped_cards_say_where_the_model_comes_from(name):
    known = card(name)
    assert sum(source is not None for source in (known.package, known.hub, known.folder)) == 1


def test_the_names_that_make_checks_are_the_options():
    assert option_names() == list(options())


def test_every_option_is_read_somewhere():
    reads = {
        node.attr
        for file in (ROOT / "launcher").glob("*.py")
        if file.name != "config.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
    } | {"dir"}  # run.dir is read through Config.run_dir
    assert {path for path in options() if path.split(".")[1] not in reads} == set()


@pytest.mark.parametrize("path", options())
def test_a_typo_in_any_option_names_the_right_one(path):
    typo = path[:-1] if len(path.split(".")[1]) > 2 else path + "x"
    with pytest.raises(UserError) as error:
        load(parse([f"{typo}=1"]))
    assert f"{typo}: unknown option; did you mean" in str(error.value)


@pytest.mark.parametrize("method", shipped("peft"))
def test_a_resolved_configuration_reads_back_the_same(method):
    config = load(parse([f"PEFT={method}", *([] if method == "prefix" else ["adapter.targets=[q_proj]"])]))
    assert check(config.model_dump(mode="json")) == config


def test_later_sources_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 3e-4}\nadapter: {method: lora, r: 4}\n")
    config = load(parse([str(file), "adapter.r=8"]))
    assert (config.optim.lr, config.adapter.r, config.adapter.alpha) == (3e-4, 8, 32.0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"adapter": {"method": "qlora"}}, "quant.bits=4"),
        ({"quant": {"type": "fp4"}}, "lora does not quantise"),
        ({"data": {"held_out": 0.2}}, "cafe brings its own"),
        ({"parallel": {"strategy": "zero9"}}, "unknown strategy"),
        ({"optim": {"lr": -1}, "batch": {"size": 0}}, "batch.size=0"),
        (
            {"adapter": {"targets": "q_proj"}},
            "adapter.targets=q_proj: not a valid value; try adapter.targets=all-linear",
        ),
        ({"run": {"seed": 99999999999}}, "run.seed=99999999999: input should be less than 4294967296; try run.seed=0"),
        ({"run": {"seed": -1}}, "try run.seed=0"),
        (
            {"optim": {"lr": 1e-12}},
            "optim.lr=1e-12: input should be greater than or equal to 0.0000001; try optim.lr=0.001",
        ),
        ({"batch": {"micro": 0}}, "batch.micro=0: not a valid value; try batch.micro=auto"),
    ],
)
def test_an_option_without_effect_is_an_error(values, says):
    with pytest.raises(UserError) as error:
        check(values)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("model", "name"),
    [("gpt-2", "gpt-2"), ("org/name", "name"), ("/some/name/", "name"), (".", "here"), ("x/..", "here"), ("..", "in")],
)
def test_a_run_is_called_by_its_model_however_that_is_written(tmp_path, monkeypatch, model, name):
    (tmp_path / "in" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "here")
    assert default_run_dir(model, "lora") == f"runs/{name}-lora"


def test_broken_yaml_names_the_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n  lr: [1\nbatch: 3\n")
    with pytest.raises(UserError) as error:
        load(parse([str(file)]))
    assert f"{file}:3" in str(error.value)
