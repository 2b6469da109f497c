"""The memory of one training process at its highest, computed from the sizes of the model. Pure, and free of torch.

docs/memory.md compares it with what is measured.
"""

from dataclasses import dataclass

from launcher.activations import Step, activation_bytes, backward_bytes, head_bytes
from launcher.architecture import Architecture
from launcher.config import Config
from launcher.targets import num_trained

SIZES = {"bf16": 2, "fp32": 4}
# A CUDA context with the libraries' kernels: a rule of thumb, not measured.
CUDA_CONTEXT = 600_000_000
# DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance, as they are unless set: ZeRO-3 does not let go of
# gathered parameters that it needs again before so many others. That is where the forward pass turns, at the peak.
LIVE = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on the device it trains on; `host` are those it holds in the host's memory beside it.

    `logits` is what comes and goes on top of the activations: in the head, or in the backward pass of one layer.
    """

    weights: int
    adapter: int
    gradients: int
    moments: int
    activations: int
    logits: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        """All of it on the device."""
        held = self.weights + self.adapter + self.gradients + self.moments
        return held + self.activations + self.logits + self.buffers


def frozen_bytes(config: Config, architecture: Architecture, size: int) -> int:
    """The frozen base: `size` bytes a parameter, or four bits where it is quantised (arXiv:2305.14314, section 3).

    A block of 64 weights has one constant: fp32, or 8 bits with an fp32 one for 256 of them (double quantisation). The
    embedding, the head, norms and biases are not quantised.
    """
    if not config.quant.bits:
        return architecture.num_parameters * size
    constant = 1 / 64 + 4 / (64 * 256) if config.quant.double else 4 / 64
    small = architecture.num_linear
    return int(small * (config.quant.bits / 8 + constant)) + (architecture.num_parameters - small) * size


def estimate(
    config: Config,
    architecture: Architecture,
    *,
    stage: int = 0,
    is_offloaded: bool = False,
    is_sharded_engine: bool = False,
    world: int = 1,
    micro: int,
    length: int,
    dtype: str,
    on_gpu: bool,
    has_mask: bool = True,
) -> Memory:
    """What one of `world` processes holds when it holds most: at the end of a forward pass, in the head.

    ZeRO (arXiv:1910.02054, section 5) shards the optimizer's states from `stage` 1 on, the gradients from 2, the
    parameters at 3. `is_sharded_engine`: DeepSpeed trains, which holds the adapter in `dtype` beside a sharded fp32 copy.
    `length` counts the tokens of a row without a prefix. Gradients are counted whole, as accumulation needs them.
    """
    trained, size = num_trained(config.adapter, architecture), SIZES[dtype]
    step = _step(config, micro, length, dtype, on_gpu, has_mask, is_sharded_engine)
    shards, held = (world, size) if is_sharded_engine else (1, 4)
    weights, host = _base(config, architecture, size, world if stage == 3 else 0, is_offloaded)
    # What is exchanged lies in buckets of an adapter's size: DDP's and DeepSpeed's one, ZeRO-3's two, which take turns.
    buffers = trained * held * (0 if world == 1 else 2 if stage == 3 else 1) + (CUDA_CONTEXT if on_gpu else 0)
    if config.quant.bits and not on_gpu and architecture.stored == dtype:
        # What is not quantised is used where the file is mapped, and the pages that were read for the rest stay there.
        buffers += architecture.num_linear * size
    return Memory(
        weights=weights,
        adapter=trained * held + (4 * trained // shards if is_sharded_engine else 0),
        gradients=trained * held // (shards if stage >= 2 else 1),
        moments=8 * trained // (shards if stage >= 1 else 1),
        activations=activation_bytes(config, architecture, step),
        logits=max(head_bytes(architecture, step), backward_bytes(config, architecture, step)),
        buffers=buffers,
        host=host,
    )


def _step(
    config: Config, micro: int, length: int, dtype: str, on_gpu: bool, has_mask: bool, is_sharded_engine: bool
) -> Step:
    # DeepSpeed casts the adapter and not what it reads; on a GPU PEFT leaves what a 4-bit layer reads as it is.
    is_cast = dtype == "bf16" and not is_sharded_engine and not (config.quant.bits and on_gpu)
    num_prefix = config.adapter.num_tokens if config.adapter.method == "prefix" else 0
    return Step(micro, length, SIZES[dtype], is_cast, has_mask or num_prefix > 0, num_prefix, 1 if on_gpu else 4)


def _base(config: Config, architecture: Architecture, size: int, shards: int, is_offloaded: bool) -> tuple[int, int]:
    """Bytes of the frozen base on the device and in the host's memory; `shards` 0: it is whole in every process."""
    frozen = frozen_bytes(config, architecture, size)
    if not shards:
        return frozen, 0
    largest = max(architecture.num_embedding, *(x.inputs * x.outputs for x in architecture.linears()))
    gathered = min(frozen, max(LIVE, largest) * size)
    shard = frozen // shards
    return (gathered, shard) if is_offloaded else (min(frozen, shard + gathered), 0)
