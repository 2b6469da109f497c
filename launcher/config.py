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
    is_hub_data,
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
    gradient_checkpointing: bool = Field(
        False, description="keep no activations, compute them again in the backward pass: less memory, slower"
    )


class Data(Section):
    """What is learned from."""

    source: str = Field(
        EMBEDDED_TASK, description="`cafe`, a data file, a folder of texts or a hub dataset: see README"
    )
    subset: str | None = Field(None, description="configuration of a hub dataset; none = its default")
    split: str = Field("train", description="split of a hub dataset, of which a share is held out")
    revision: str | None = Field(None, description="branch, tag or commit of a hub dataset; none = main")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="what a faulty record does: end the run, or be left out"
    )
    max_length: int = Field(1024, ge=8, description="longest example, in tokens")
    overflow: Literal["error", "truncate", "drop", "split"] = Field(
        "error", description="what becomes of a longer one; split makes several of it, of plain text only"
    )
    limit: int | None = Field(None, ge=1, description="use only so many training examples")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the examples kept to measure with, at most 200")


class Adapter(Section):
    """The trained part. `qlora` is LoRA over a base held in four bits. `METHOD_OPTIONS` says whose each option is."""

    method: Literal["lora", "qlora", "ia3", "prefix"] = "lora"
    targets: Literal["all-linear"] | tuple[str, ...] = Field("all-linear", description="names of the adapted modules")
    r: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1)
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead (arXiv:2312.03732)")
    dora: bool = Field(False, description="train magnitude and direction apart (arXiv:2402.09353)")
    feedforward: tuple[str, ...] | None = Field(
        None, description="modules scaled at their input, not their output; none = PEFT's choice for the architecture"
    )
    num_tokens: int = Field(30, ge=1, description="length of the prefix, in positions")
    start: Literal["text", "random"] = Field(
        "text", description="text = the keys and values of the first training examples"
    )
    projection: bool = Field(
        False, description="learn the prefix through a two-layer network, which needs start=random"
    )

    def misplaced(self) -> str | None:
        """What is wrong with the options of this method, None if nothing is."""
        given = [name for name in self.__class__.model_fields if getattr(self, name) != getattr(Adapter(), name)]
        for name in given:
            if name != "method" and name not in METHOD_OPTIONS[self.method]:
                owners = " or ".join(m for m, options in METHOD_OPTIONS.items() if name in options)
                return f"adapter.{name}: not an option of {self.method}; try PEFT={owners}, or without it"
        if self.projection and self.start == "text":
            return "adapter.projection: a projected prefix cannot start from a text; try adapter.start=random too"
        return None


LORA_OPTIONS = ("targets", "r", "alpha", "dropout", "rslora", "dora")
METHOD_OPTIONS = {
    "lora": LORA_OPTIONS,
    "qlora": LORA_OPTIONS,
    "ia3": ("targets", "feedforward"),
    "prefix": ("num_tokens", "start", "projection"),
}


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
    lora_plus: float = Field(1.0, ge=1, description="LoRA+: B learns so many times as fast as A (arXiv:2402.12354)")
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
    packing: bool | Literal["auto"] = Field(
        "auto", description="lay short examples one after another in a row; auto = where it is cheaper than padding"
    )


class Parallel(Section):
    """How the processes share the work: a name of `configs/strategy/`."""

    strategy: str = "auto"


class Eval(Section):
    """The evaluations during a run: before the first step, every so many steps, and at the end on the whole split."""

    every: int = Field(50, ge=1, description="steps between evaluations")
    examples: int = Field(40, ge=1, description="held-out examples measured each time")
    answers: int = Field(8, ge=0, description="held-out questions that the model answers each time")


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
    eval: Eval = Eval()
    run: Run = Run()

    @model_validator(mode="after")
    def _options_take_effect(self) -> "Config":
        if fault := self.adapter.misplaced():
            raise ValueError(fault)
        if self.optim.lora_plus != 1 and self.adapter.method not in ("lora", "qlora"):
            raise ValueError(f"optim.lora_plus: {self.adapter.method} has no B matrix; try PEFT=lora")
        if self.adapter.method == "prefix" and self.model.gradient_checkpointing:
            raise ValueError(
                "model.gradient_checkpointing: PEFT cannot recompute activations behind a prefix; try PEFT=lora, or a "
                "smaller batch.micro"
            )
        if self.adapter.method == "qlora" and self.quant.bits is None:
            raise ValueError("quant.bits: qlora holds the base in four bits; try quant.bits=4")
        if self.adapter.method != "qlora" and self.quant != Quant():
            raise ValueError(f"quant: {self.adapter.method} does not quantise the base; try PEFT=qlora")
        if self.data.source == EMBEDDED_TASK and self.data.held_out != Data().held_out:
            raise ValueError("data.held_out: cafe brings its own held-out split; try without it")
        if self.data.source == EMBEDDED_TASK and self.data.on_error != Data().on_error:
            raise ValueError("data.on_error: cafe has no faulty records; try without it")
        for option in ("subset", "split", "revision"):
            if getattr(self.data, option) != getattr(Data(), option) and not is_hub_data(self.data.source):
                raise ValueError(f"data.{option}: {self.data.source} is not a hub dataset; try without it")
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
