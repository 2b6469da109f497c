"""The configuration of a run: every option with its default, frozen, checked once at the edge.

An option that could not take effect is an error, never a warning. `compose` says where values come from.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from launcher.variables import (
    DEFAULT_MODEL,
    EMBEDDED_TASK,
    check_strategy,
    is_hub_data,
)

# The shortest that an example may have to be, in tokens.
SHORTEST = 8


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
    max_length: int = Field(1024, ge=SHORTEST, description="longest example, in tokens")
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
        given = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
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
    lr: float = Field(1e-3, ge=1e-7, description="at less, fp32 weights near 1 do not move")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    lora_plus: float = Field(1.0, ge=1, description="LoRA+: B learns so many times as fast as A (arXiv:2402.12354)")
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps, whatever the epochs")


class Batch(Section):
    """The global batch is what you choose; what each process does at a time follows from it."""

    size: int = Field(8, ge=1, description="examples a step, over all processes")
    micro: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="examples a process holds at once; auto = at most 16"
    )
    packing: bool | Literal["auto"] = Field(
        "auto", description="lay short examples one after another in a row; auto = where it is cheaper than padding"
    )


class Parallel(Section):
    """How the processes share the work."""

    strategy: str = Field("auto", description="a name of configs/strategy/; auto = the fastest that fits")
    timeout_s: float = Field(
        600.0, ge=5, description="end a run in which no process has moved for so long, and name the one that stopped"
    )


class Eval(Section):
    """The evaluations during a run: before the first step, every so many steps, and at the end, then also on the whole split."""

    every: int = Field(50, ge=1, description="steps between evaluations")
    examples: int = Field(40, ge=1, description="held-out examples measured each time")
    answers: int = Field(8, ge=0, description="held-out questions that the model answers each time")


class Checkpoint(Section):
    """What is left on disk during a run, to go on from."""

    every: int = Field(50, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest ones kept; also the best by held-out loss, which nothing reads")


class Run(Section):
    """The run folder, and the seed of everything random."""

    dir: str | None = Field(None, description="none = runs/<model>-<method>")
    seed: int = Field(0, ge=0, lt=2**32, description="32 bits: those of a step stand beside it")


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
    checkpoint: Checkpoint = Checkpoint()
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
    """`runs/<model>-<method>`, also for hub ids and folders: `org/name` and `some/name` give `name`, `.` that of the folder."""
    folder = Path(model)
    name = folder.resolve().name if folder.name in ("", "..") else folder.name
    return f"runs/{name}-{method}"
