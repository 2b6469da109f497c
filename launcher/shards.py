"""Whole tensors of a training that DeepSpeed may shard; every process must call each of these together.

`stage` is DeepSpeed's ZeRO stage, None where DeepSpeed does not run. From stage 1 on the fp32 masters and the moments are
sharded, at stage 3 the parameters that compute are too.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
BITSANDBYTES_MOMENTS = {"exp_avg": "state1", "exp_avg_sq": "state2"}


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Whether ZeRO-3 shares out the parameter that computes."""
    return hasattr(parameter, "ds_id")


def num_elements(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole parameter."""
    return parameter.ds_numel if is_sharded(parameter) else parameter.numel()


def num_held(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter that this process keeps between two uses."""
    return parameter.ds_tensor.numel() if is_sharded(parameter) else parameter.numel()


@contextlib.contextmanager
def gathered(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """While this lasts the parameters are whole here, to be read."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(sharded):
        yield


def read(parameter: torch.nn.Parameter, optimizer: Any, stage: int | None) -> dict[str, torch.Tensor]:
    """`param` (the fp32 master where there is one) and the two moments of AdamW, whole."""
    if stage is None:
        state = optimizer.state[parameter]
        names = BITSANDBYTES_MOMENTS if "state1" in state else {kind: kind for kind in MOMENTS}
        return {"param": parameter.data, **{kind: state[name] for kind, name in names.items()}}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
    return {"param": safe_get_full_fp32_param(parameter), **moments}


@torch.no_grad()
def write_parameter(parameter: torch.nn.Parameter, value: torch.Tensor, stage: int | None) -> None:
    """Set a parameter, master and computing copy: DeepSpeed would refresh the copy only after its next step."""
    if stage is not None:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)
    if not is_sharded(parameter):
        parameter.data.copy_(value)
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(value)


def write_moments(
    parameter: torch.nn.Parameter, values: Mapping[str, torch.Tensor], optimizer: Any, step: int, stage: int | None
) -> None:
    """Set the moments of one parameter. DeepSpeed must have made its states already; the step count is set by the caller."""
    if stage is not None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for kind in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[kind], kind)
        return
    moments = {kind: values[kind].to(parameter.device) for kind in MOMENTS}
    if not hasattr(optimizer, "init_state"):
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        return
    # bitsandbytes fills its own buffers, paged ones included.
    group = next(i for i, g in enumerate(optimizer.param_groups) if any(p is parameter for p in g["params"]))
    index = next(i for i, p in enumerate(optimizer.param_groups[group]["params"]) if p is parameter)
    optimizer.init_state(optimizer.param_groups[group], parameter, group, index)
    optimizer.state[parameter]["step"] = step
    for kind, name in BITSANDBYTES_MOMENTS.items():
        optimizer.state[parameter][name].copy_(moments[kind])
