"""Which layers an adapter changes, and how many parameters that makes. Pure, and free of torch."""

from launcher.architecture import Architecture, Linear
from launcher.config import Adapter

# The layers that end a feed-forward block, as PEFT names them for (IA)3.
FEEDFORWARD = ("down_proj", "mlp.c_proj")


def targeted(adapter: Adapter, architecture: Architecture) -> list[Linear]:
    """The linear layers that an adapter of this kind changes; none for a prefix."""
    if adapter.method == "prefix":
        return []
    linears = list(architecture.linears())
    if adapter.targets == "all-linear":
        return linears
    return [linear for linear in linears if _ends(linear, adapter.targets)]


def _ends(linear: Linear, endings: tuple[str, ...]) -> bool:
    return any(f".{linear.name}".endswith(f".{ending}") for ending in endings)


def is_scaled_before(adapter: Adapter, linear: Linear) -> bool:
    """Whether (IA)3 scales what this layer reads, and not what it gives."""
    return _ends(linear, adapter.feedforward or FEEDFORWARD)


def num_trained(adapter: Adapter, architecture: Architecture) -> int:
    """The trained parameters, exactly, for every family that the architecture knows."""
    linears = targeted(adapter, architecture)
    if adapter.method == "prefix":
        per_token = 2 * architecture.num_layers * architecture.keys
        if not adapter.projection:
            return adapter.num_tokens * per_token
        # An embedding and two layers with biases; the inner one is as wide as the model.
        width, keys = architecture.width, architecture.keys
        return adapter.num_tokens * keys + (keys + 1) * width + (width + 1) * per_token
    if adapter.method == "ia3":
        return sum(x.inputs if is_scaled_before(adapter, x) else x.outputs for x in linears)
    return sum(adapter.r * (x.inputs + x.outputs) + adapter.dora * x.outputs for x in linears)
