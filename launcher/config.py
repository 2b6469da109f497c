"""The configuration of a run: frozen, complete, checked once at the edge.

A value comes from, later wins: the defaults below, `configs/peft/<method>.yaml`, the run's own YAML, the make variables,
the `section.option=value` overrides. An option that could not take effect is an error, never a warning.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from launcher.errors import UserError, nearest
from launcher.variables import (
    CONFIGS,
    DEFAULT_MODEL,
    DEFAULT_PEFT,
    EMBEDDED_TASK,
    Variables,
    check_data,
    check_model,
    check_strategy,
    shipped,
)


class Section(BaseModel):
    """A frozen group of options; a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Model(Section):
    """The base model: a name of `configs/models/`, a hub id or a local folder."""

    name: str = DEFAULT_MODEL
    revision: str | None = Field(None, description="hub branch, tag or commit; none = the catalogue's, or main")
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto = bf16 where the hardware has it")


class Data(Section):
    """What is learned from."""

    source: str = Field(EMBEDDED_TASK, description="`cafe`, or a .jsonl file of {messages: [{role, content}, …]} lines")
    max_length: int = Field(1024, ge=8, description="longest example, in tokens; a longer one is an error")
    limit: int | None = Field(None, ge=1, description="use only so many training examples")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of a file's examples kept to measure with, at most 200")


class Adapter(Section):
    """The trained part. `qlora` is LoRA over a base held in four bits."""

    method: Literal["lora", "qlora"] = "lora"
    r: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = Field("all-linear", description="names of the adapted modules")


class Quant(Section):
    """How the frozen base is held; only for qlora."""

    bits: Literal[4] | None = None
    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = Field(True, description="quantise the quantisation constants too")


class Optim(Section):
    """AdamW: linear warm-up, then cosine decay to zero."""

    name: Literal["adamw", "paged_adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps, whatever the epochs")


class Batch(Section):
    """The global batch is what you choose; what each process does at a time follows from it."""

    size: int = Field(16, ge=1, description="examples a step, over all processes")
    micro: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="examples a process holds at once; auto = at most 16"
    )


class Parallel(Section):
    """How the processes share the work: a name of `configs/strategy/`."""

    strategy: str = "auto"


class Run(Section):
    """The run folder and what is written into it when."""

    dir: str | None = Field(None, description="none = runs/<model>-<method>")
    seed: int = 0
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept")


class Config(Section):
    """Everything a run is decided by."""

    model: Model = Model()
    data: Data = Data()
    adapter: Adapter = Adapter()
    quant: Quant = Quant()
    optim: Optim = Optim()
    batch: Batch = Batch()
    parallel: Parallel = Parallel()
    run: Run = Run()

    @model_validator(mode="after")
    def _options_take_effect(self) -> "Config":
        if self.adapter.method == "qlora" and self.quant.bits is None:
            raise ValueError("quant.bits: qlora holds the base in four bits; try quant.bits=4")
        if self.adapter.method != "qlora" and self.quant != Quant():
            raise ValueError(f"quant: {self.adapter.method} does not quantise the base; try PEFT=qlora")
        if self.data.source == EMBEDDED_TASK and self.data.held_out != Data().held_out:
            raise ValueError("data.held_out: cafe brings its own held-out split; try without it")
        if fault := check_strategy(self.parallel.strategy):
            raise ValueError(f"parallel.strategy: {fault}")
        return self

    @property
    def run_dir(self) -> Path:
        """The folder of this run, relative to where the command was given."""
        return Path(self.run.dir or default_run_dir(self.model.name, self.adapter.method))


def default_run_dir(model: str, method: str) -> str:
    """`runs/<model>-<method>`, also for hub ids and folders: `org/name` and `some/name` give `name`."""
    return f"runs/{Path(model).name}-{method}"


def load(variables: Variables) -> Config:
    """Compose and check the configuration; raises `UserError` with one line a fault."""
    given: dict[str, Any] = _read_yaml(Path(variables.config_file)) if variables.config_file else {}
    for section, option, value in (
        ("model", "name", variables.model),
        ("data", "source", variables.data),
        ("adapter", "method", variables.peft),
        ("parallel", "strategy", variables.strategy),
        ("run", "dir", _run_dir(variables.run)),
    ):
        if value is not None:
            _set(given, [section, option], value)
    for override in variables.overrides:
        path, _, text = override.partition("=")
        _set(given, path.split("."), _parse_value(text))
    method = _method(given)
    tuned = _read_yaml(CONFIGS / "peft" / f"{method}.yaml") if method in shipped("peft") else {}
    config = check(_merge(tuned, given))
    named = {"model.name": check_model(config.model.name), "data.source": check_data(config.data.source)}
    if faults := [f"{path}: {fault}" for path, fault in named.items() if fault]:
        raise UserError(*faults)
    return config


def check(values: dict[str, Any]) -> Config:
    """A `Config` from nested values; raises `UserError` with one line a fault, each with its dotted path."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        # A union tells one fault for each of its members.
        raise UserError(*dict.fromkeys(_fault(e) for e in error.errors())) from None


def options() -> dict[str, Any]:
    """Every option by its dotted path, with its `FieldInfo`."""
    return {
        f"{section}.{option}": info
        for section, field in Config.model_fields.items()
        for option, info in field.annotation.model_fields.items()  # type: ignore[union-attr]
    }


def _run_dir(run: str | None) -> str | None:
    return run if run is None or "/" in run else f"runs/{run}"


def _method(given: dict[str, Any]) -> str:
    adapter = given.get("adapter")
    return str(adapter.get("method", DEFAULT_PEFT)) if isinstance(adapter, dict) else DEFAULT_PEFT


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f':{where.line + 1}' if where else ''}: not YAML; try one of configs/runs/") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold sections ({', '.join(Config.model_fields)}); try one of configs/runs/")
    return values


def _parse_value(text: str) -> Any:
    """A YAML scalar or list; YAML 1.1 reads 1e-4 as text, pydantic then makes it a number."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[path[-1]] = value


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _fault(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"][:2])
    if error["type"] == "extra_forbidden":
        known = [*options(), *Config.model_fields]
        return f"{path}: unknown option; {nearest(path, known)} The list is in launcher/config.py"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    default = options()[path].default if path in options() else None
    hint = f"; try {path}={default}" if default is not None else "; try without it"
    if len(error["loc"]) > 2:
        return f"{path}={error['input']}: not a valid value{hint}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{path}={error['input']}: {message}{hint}"
