"""What is assembled before the loop: processes, data, model, optimizer, and the state of an earlier attempt."""

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from launcher import checkpoint, gate, methods, models
from launcher.batches import each_alone, is_packing_cheaper, micro_batches, order, pack
from launcher.catalogue import ModelCard, card
from launcher.config import Config
from launcher.encoding import Example
from launcher.errors import UserError
from launcher.hardware import detect
from launcher.loss import Trainee
from launcher.material import Material
from launcher.plan import num_steps, resolve_dtype, split_batch
from launcher.weights import Weights


@dataclass
class Job:
    """What the phases of one training share. `start` has digests of the trained tensors before the first step."""

    config: Config
    accelerator: Accelerator
    material: Material
    weights: Weights
    card: ModelCard
    micro: int
    steps: int
    shape: models.Shape
    is_packed: bool
    model: Any = None
    optimizer: Any = None
    parameters: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    start: dict[str, str] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the template that is trained."""
        return self.material.tokenizer

    @property
    def peft_model(self) -> Any:
        """The `PeftModel` inside all wrappers."""
        return self.accelerator.unwrap_model(self.model).model

    @property
    def quadratic(self) -> float:
        """The length at which attention costs a token as much as its matrices do (see `batches.cost`)."""
        return 6.0 * self.shape.width

    def rows(self, micro: list[Example]) -> list[list[Example]]:
        """How the examples of a micro-batch lie in rows."""
        return pack(micro, self.quadratic) if self.is_packed else each_alone(micro)

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
    # DeepSpeed calls torch by names that torch gives up; the person at the screen can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
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


def assemble(
    config: Config, accelerator: Accelerator, weights: Weights, material: Material, shape: models.Shape
) -> Job:
    """Everything but the model. Raises `UserError` for packing that this model cannot do exactly."""
    job = Job(
        config=config,
        accelerator=accelerator,
        material=material,
        weights=weights,
        card=card(config.model.name),
        micro=split_batch(config, accelerator.num_processes)[0],
        steps=num_steps(config, len(material.train)),
        shape=shape,
        is_packed=config.batch.packing is True,
    )
    if job.is_packed and job.shape.is_local:
        raise UserError("batch.packing: this model has layers that read a window only; try batch.packing=off")
    if config.batch.packing == "auto" and not job.shape.is_local:
        job.is_packed = is_packing_cheaper(sample_micros(job), job.quadratic)
    return job


def global_batch(job: Job, step: int) -> list[Example]:
    """The examples of a step, over all processes: always `batch.size` of them."""
    indices = order(len(job.material.train), job.config.batch.size, step, job.config.run.seed)
    return [job.material.train[i] for i in indices]


def sample_micros(job: Job, num_steps: int = 20) -> list[list[Example]]:
    """The micro-batches of the first steps, of all processes: what the cost of padding is judged by."""
    world = job.accelerator.num_processes
    steps = [global_batch(job, step) for step in range(min(num_steps, job.steps))]
    return [m for batch in steps for rank in range(world) for m in micro_batches(batch, rank, world, job.micro)]


def load_model(job: Job) -> None:
    """Base, adapter and optimizer, prepared by accelerate for the strategy that was launched."""
    config, accelerator = job.config, job.accelerator
    base = models.load_base(job.weights.path, job.dtype, config.quant, accelerator.device)
    if config.model.gradient_checkpointing:
        models.checkpoint_gradients(base)
    torch.manual_seed(config.run.seed)
    trainee = Trainee(methods.attach(base, config.adapter, job.material.train)).train()
    if accelerator.is_main_process:
        job.start = gate.digests(methods.trainable(trainee)) | gate.digests(methods.saved_tensors(trainee.model))
    optimizer = make_optimizer(config, trainee)
    with models.quiet():
        job.model, job.optimizer = accelerator.prepare(trainee, optimizer)
    job.parameters = methods.trainable(accelerator.unwrap_model(job.model))


def make_optimizer(config: Config, trainee: Trainee) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101); the paged one keeps its states in memory that the GPU may page out."""
    parameters = _groups(methods.trainable(trainee), config.optim.lora_plus)
    options: dict[str, Any] = {"lr": config.optim.lr, "weight_decay": config.optim.weight_decay}
    if config.optim.name == "paged_adamw":
        from bitsandbytes.optim import PagedAdamW32bit

        # Said in our own words in the first lines of the run (see `plan.notes`).
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        return PagedAdamW32bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def _groups(parameters: dict[str, torch.nn.Parameter], ratio: float) -> list[dict[str, Any]]:
    """Parameter groups with the `ratio` of their learning rate: LoRA+ (arXiv:2402.12354) lets B learn faster than A."""
    fast = [parameter for name, parameter in parameters.items() if ratio != 1 and "lora_B" in name]
    slow = [parameter for parameter in parameters.values() if not any(parameter is other for other in fast)]
    return [{"params": slow, "ratio": 1.0}, *([{"params": fast, "ratio": ratio}] if fast else [])]


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
        start = {f"param/{name}": job.start[name] for name in job.parameters}
        checkpoint.write(config.run_dir, state, start, step=step, position=position, keep=config.run.keep)
    job.accelerator.wait_for_everyone()


def gather_state(job: Job) -> dict[str, torch.Tensor]:
    """The whole trained state; every process must call this together."""
    return checkpoint.gather(job.parameters, job.inner_optimizer, sharded=job.is_sharded)
