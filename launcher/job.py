"""What is assembled before the loop: processes, data, model, optimizer, and the state of an earlier attempt."""

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from launcher import checkpoint, data, methods, models
from launcher.catalogue import ModelCard, card
from launcher.config import Config
from launcher.encoding import Example, encode
from launcher.errors import UserError
from launcher.hardware import detect
from launcher.loss import Trainee
from launcher.plan import num_steps, resolve_dtype, split_batch
from launcher.weights import Weights


@dataclass
class Job:
    """What the phases of one training share."""

    config: Config
    accelerator: Accelerator
    tokenizer: Any
    train: list[Example]
    held_out: list[Example]
    micro: int
    steps: int
    splits: data.Splits
    weights: Weights
    card: ModelCard
    model: Any = None
    optimizer: Any = None
    parameters: dict[str, torch.nn.Parameter] = field(default_factory=dict)

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer inside accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def dtype(self) -> str:
        """The dtype of the forward pass, `bf16` or `fp32`."""
        return "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32"

    @property
    def is_sharded(self) -> bool:
        """Whether DeepSpeed holds the optimizer state in shards."""
        return hasattr(self.model, "zero_optimization_stage")

    @property
    def strategy(self) -> str:
        """The strategy that really runs, asked of the engine and not of the configuration."""
        if self.is_sharded:
            return f"zero{self.model.zero_optimization_stage()}"
        return "single" if self.accelerator.num_processes == 1 else "ddp"


def start_processes(config: Config) -> Accelerator:
    """Join the process group that the launcher announced in the environment, on gloo where there is no GPU."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            _without_compiler()
    world = world_size()
    micro, accumulation = split_batch(config, world)
    accelerator = Accelerator(
        mixed_precision="bf16" if resolve_dtype(config, detect().has_bf16) == "bf16" else "no",
        gradient_accumulation_steps=accumulation,
        # Without the explicit backend accelerate sees one process while DeepSpeed sees several.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if world > 1 and not on_gpu else [],
    )
    assert accelerator.num_processes == world, f"{accelerator.num_processes} processes joined, {world} were started"
    if plugin := accelerator.state.deepspeed_plugin:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro
        plugin.deepspeed_config["gradient_clipping"] = config.optim.clip
    return accelerator


def world_size() -> int:
    """How many processes the launcher announced."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _without_compiler() -> None:
    """Keep DeepSpeed's gloo backend from compiling its shared-memory all-reduce: a fresh machine has no C++ compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_data(config: Config, accelerator: Accelerator, weights: Weights, splits: data.Splits) -> Job:
    """Tokenise; every process does the same."""
    known = card(config.model.name)
    tokenizer = models.load_tokenizer(weights.path, known.template)
    longest = min(config.data.max_length, models.context_length(weights.path))
    examples = encode(tokenizer, splits.train, longest)
    return Job(
        config=config,
        accelerator=accelerator,
        tokenizer=tokenizer,
        train=examples,
        held_out=encode(tokenizer, splits.held_out, longest),
        splits=splits,
        micro=split_batch(config, accelerator.num_processes)[0],
        steps=num_steps(config, len(examples)),
        weights=weights,
        card=known,
    )


def load_model(job: Job) -> None:
    """Base, adapter and optimizer, prepared by accelerate for the strategy that was launched."""
    config, accelerator = job.config, job.accelerator
    base = models.load_base(job.weights.path, job.dtype, config.quant, accelerator.device)
    torch.manual_seed(config.run.seed)
    trainee = Trainee(methods.attach(base, config.adapter)).train()
    optimizer = make_optimizer(config, trainee)
    with models.quiet():
        job.model, job.optimizer = accelerator.prepare(trainee, optimizer)
    job.parameters = methods.trainable(accelerator.unwrap_model(job.model))


def make_optimizer(config: Config, trainee: Trainee) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101); the paged one keeps its states in memory that the GPU may page out."""
    parameters = list(methods.trainable(trainee).values())
    options: dict[str, Any] = {"lr": config.optim.lr, "weight_decay": config.optim.weight_decay}
    if config.optim.name == "paged_adamw":
        from bitsandbytes.optim import PagedAdamW32bit

        # Said in our own words in the first lines of the run (see `plan.notes`).
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        return PagedAdamW32bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def check_strategy(job: Job) -> None:
    """Refuse to train with another strategy than the one asked for: it must never be lost silently."""
    asked = job.config.parallel.strategy
    if job.is_sharded and job.config.optim.name == "paged_adamw":
        raise UserError("DeepSpeed cannot shard a paged optimizer; try PEFT=lora, or start one plain process")
    if asked not in ("auto", job.strategy):
        raise UserError(
            f"parallel.strategy={asked}, but these processes run {job.strategy}; try: accelerate launch "
            f"--config_file configs/strategy/{asked}.yaml --num_processes 2 -m launcher.train ..."
        )


def save_checkpoint(job: Job, step: int) -> None:
    """Gather the trained state from every process; the first one writes it."""
    state = gather_state(job)
    if job.accelerator.is_main_process:
        config = job.config
        position = step * config.batch.size
        checkpoint.write(config.run_dir, state, step=step, position=position, keep=config.run.keep)
    job.accelerator.wait_for_everyone()


def gather_state(job: Job) -> dict[str, torch.Tensor]:
    """The whole trained state; every process must call this together."""
    return checkpoint.gather(job.parameters, job.inner_optimizer, sharded=job.is_sharded)
