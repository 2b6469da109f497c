"""Join the processes of a training, for the strategy that was asked for or that their launcher announced."""

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

from launcher.architecture import Architecture
from launcher.arithmetic import resolve_dtype, split_batch
from launcher.config import Config
from launcher.hardware import detect
from launcher.ports import interface_towards
from launcher.ranks import world_size
from launcher.strategies import deepspeed_facts, launched
from launcher.targets import num_trained


def start_processes(config: Config, architecture: Architecture) -> Accelerator:
    """Join the process group that the launcher announced in the environment, on gloo where there is no GPU.

    accelerate's launcher and plain torchrun will both do: what a strategy's file says is applied here where the launcher
    has not read it.
    """
    on_gpu, world, strategy = torch.cuda.is_available(), world_size(), launched(config.parallel.strategy)
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        if strategy.stage:
            _without_compiler()
    if world > 1 and (interface := interface_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # DeepSpeed calls torch by names that torch gives up; the person at the screen can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    plugin = None
    if strategy.stage and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        plugin = DeepSpeedPlugin(**deepspeed_facts(strategy.name))
    micro, accumulation = split_batch(config, world)
    accelerator = Accelerator(
        # Said only where DeepSpeed does not run, which it would silently turn off.
        cpu=not on_gpu and not strategy.stage,
        mixed_precision="bf16" if resolve_dtype(config, detect().has_bf16) == "bf16" else "no",
        gradient_accumulation_steps=accumulation,
        deepspeed_plugin=plugin,
        kwargs_handlers=[_process_group(config, on_gpu)] if world > 1 or strategy.stage else [],
    )
    assert accelerator.num_processes == world, f"{accelerator.num_processes} processes joined, {world} were started"
    if plugin := accelerator.state.deepspeed_plugin:
        _complete(plugin.deepspeed_config, config, micro, architecture)
    return accelerator


def _process_group(config: Config, on_gpu: bool) -> InitProcessGroupKwargs:
    """How the processes talk. The watchdog, which can name the one that hangs, looks before the group gives up."""
    patience = timedelta(seconds=60 + 2 * config.parallel.timeout_s)
    # Without the explicit backend accelerate sees one process while DeepSpeed sees several.
    return InitProcessGroupKwargs(timeout=patience, **({} if on_gpu else {"backend": "gloo"}))


def _complete(deepspeed: dict[str, Any], config: Config, micro: int, architecture: Architecture) -> None:
    """What a strategy's file leaves to the run. The buckets hold an adapter; DeepSpeed's own size is half a billion."""
    deepspeed["train_micro_batch_size_per_gpu"] = micro
    deepspeed["gradient_clipping"] = config.optim.clip
    bucket = max(num_trained(config.adapter, architecture), 2**16)
    # The matrices of a LoRA stay whole everywhere at stage 3: they are many and small, gathering them would cost most.
    widest = max(max(linear.inputs, linear.outputs) for linear in architecture.linears())
    is_lora = config.adapter.method in ("lora", "qlora")
    deepspeed["zero_optimization"] |= {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_param_persistence_threshold": max(100_000, config.adapter.r * widest if is_lora else 0),
    }


def _without_compiler() -> None:
    """Keep DeepSpeed's gloo backend from compiling its shared-memory all-reduce: a fresh machine has no C++ compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
