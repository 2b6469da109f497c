"""What is assembled before the loop: data, model, optimizer; and what all processes do together around it."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from launcher import checkpoint, gate, methods, models, shards
from launcher.architecture import Architecture
from launcher.arithmetic import num_steps, split_batch
from launcher.batches import each_alone, is_packing_cheaper, micro_batches, order, pack
from launcher.beat import Beat
from launcher.catalogue import ModelCard, card
from launcher.config import Config
from launcher.encoding import Example
from launcher.errors import UserError
from launcher.failures import is_disk_full
from launcher.loss import Trainee, unwrapped
from launcher.material import Material
from launcher.stopping import Stop
from launcher.weights import Weights


@dataclass
class Job:
    """What the phases of one training share. `start` has digests of the trained tensors before the first step.

    `saved_step` is that of the newest checkpoint; `is_checkpoint_owed` after one that did not fit on the disk.
    """

    config: Config
    accelerator: Accelerator
    material: Material
    weights: Weights
    card: ModelCard
    micro: int
    steps: int
    architecture: Architecture
    is_packed: bool
    stop: Stop
    beat: Beat
    model: Any = None
    optimizer: Any = None
    parameters: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    start: dict[str, str] = field(default_factory=dict)
    saved_step: int = 0
    is_checkpoint_owed: bool = False

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the template that is trained."""
        return self.material.tokenizer

    @property
    def peft_model(self) -> Any:
        """The `PeftModel` inside all wrappers."""
        return unwrapped(self.model).model

    @property
    def quadratic(self) -> float:
        """The length at which attention costs a token as much as its matrices do (see `batches.cost`)."""
        return 6.0 * self.architecture.width

    def rows(self, micro: list[Example]) -> list[list[Example]]:
        """How the examples of a micro-batch lie in rows."""
        return pack(micro, self.quadratic) if self.is_packed else each_alone(micro)

    def take_smaller_parts(self, micro: int, accumulation: int) -> None:
        """Begin the step again, with `micro` examples at a time."""
        self.micro = micro
        self.optimizer.zero_grad()
        self.accelerator.step = 0
        self.accelerator.gradient_accumulation_steps = accumulation
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer inside accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def dtype(self) -> str:
        """The dtype of the forward pass, `bf16` or `fp32`."""
        return "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32"

    @property
    def stage(self) -> int | None:
        """DeepSpeed's ZeRO stage, asked of the engine; None where DeepSpeed does not run."""
        return self.model.zero_optimization_stage() if hasattr(self.model, "zero_optimization_stage") else None

    @property
    def is_base_sharded(self) -> bool:
        """Whether the frozen base is shared out too, so that every forward pass needs every process."""
        return self.stage == 3

    @property
    def strategy(self) -> str:
        """The strategy that really runs, asked of the engine and not of the configuration."""
        if self.stage is None:
            return "ddp" if isinstance(self.model, DistributedDataParallel) else "single"
        offload = self.model.zero_offload_param()
        return f"zero{self.stage}" + ("-offload" if offload and offload.device != "none" else "")

    @property
    def num_trained(self) -> int:
        """Trained parameters, over all processes."""
        return sum(map(shards.num_elements, self.parameters.values()))


def assemble(
    config: Config,
    accelerator: Accelerator,
    weights: Weights,
    material: Material,
    architecture: Architecture,
    stop: Stop | None = None,
    beat: Beat | None = None,
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
        architecture=architecture,
        is_packed=config.batch.packing is True,
        stop=stop or Stop(),
        beat=beat or Beat(None),
    )
    if job.is_packed and job.architecture.is_local:
        raise UserError("batch.packing: this model has layers that read a window only; try batch.packing=off")
    if config.batch.packing == "auto" and not job.architecture.is_local:
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
    job.beat.at("loading the base")
    base = models.load_base(job.weights.path, job.dtype, config.quant, accelerator.device)
    if config.model.gradient_checkpointing:
        models.checkpoint_gradients(base)
    torch.manual_seed(config.run.seed)
    trainee = Trainee(methods.attach(base, config.adapter)).train()
    optimizer = make_optimizer(config, trainee)
    with models.quiet():
        job.model, job.optimizer = accelerator.prepare(trainee, optimizer)
    job.parameters = methods.trainable(unwrapped(job.model))
    if config.adapter.method == "prefix" and config.adapter.start == "text":
        (prefix,) = job.parameters.values()
        value = methods.prefix_from_text(
            job.peft_model, job.material.train, config.adapter.num_tokens, accelerator.device
        )
        shards.write_parameter(prefix, value, job.stage)
    with shards.gathered(job.parameters.values()):
        job.start = gate.digests(job.parameters) | gate.digests(methods.saved_tensors(job.peft_model))


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
    if asked not in ("auto", job.strategy):
        raise UserError(
            f"parallel.strategy={asked}, but these processes run {job.strategy}; try: accelerate launch "
            f"--config_file configs/strategy/{asked}.yaml --num_processes 2 -m launcher.train ..."
        )


def is_stop_agreed(job: Job) -> bool:
    """Whether any process was told to stop; all of them get the same answer."""
    return is_agreed(job, job.stop.is_set)


def is_agreed(job: Job, value: bool) -> bool:
    """Whether this is true of any process."""
    flag = torch.tensor(float(value), device=job.accelerator.device)
    return job.accelerator.reduce(flag, "sum").item() > 0


def save_checkpoint(job: Job, step: int, loss: float | None = None) -> bool:
    """Gather the trained state from every process; the first one writes it. False if the disk is full.

    `loss` is the held-out loss where it was measured at this step.
    """
    job.beat.at("a checkpoint")
    state = gather_state(job)
    is_full = False
    if job.accelerator.is_main_process:
        config = job.config
        start = {f"param/{name}": job.start[name] for name in job.parameters}
        position = step * config.batch.size
        try:
            checkpoint.write(
                config.run_dir, state, start, step=step, position=position, keep=config.checkpoint.keep, loss=loss
            )
        except Exception as error:
            if not is_disk_full(error):
                raise
            is_full = True
    if is_agreed(job, is_full):
        return False
    job.saved_step = step
    return True


def gather_state(job: Job) -> dict[str, torch.Tensor]:
    """The whole trained state; every process must call this together."""
    return checkpoint.gather(job.parameters, job.inner_optimizer, job.stage)
