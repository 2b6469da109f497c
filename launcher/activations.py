"""What the forward and backward pass of one micro-batch hold, in bytes. Pure, and free of torch."""

from dataclasses import dataclass

from launcher.architecture import Architecture
from launcher.config import Adapter, Config
from launcher.targets import is_scaled_before, num_trained, targeted

# As launcher.loss has it, which imports torch.
CHUNK = 256


@dataclass(frozen=True)
class Step:
    """What one forward pass reads and how: `micro` rows of `length` tokens, `size` bytes a number.

    `is_cast`: autocast makes a bf16 copy of what an fp32 adapter reads, for each of its layers. `has_mask`: attention gets
    a mask and not only the order, because rows are padded or packed, or stand behind a prefix. `mask_size`: bytes of an
    element of a dropout's mask.
    """

    micro: int
    length: int
    size: int
    is_cast: bool
    has_mask: bool
    num_prefix: int
    mask_size: int = 4

    @property
    def tokens(self) -> int:
        """Positions that pass the layers."""
        return self.micro * self.length

    @property
    def keys(self) -> int:
        """Positions that attention reads."""
        return self.num_prefix + self.length


def activation_bytes(config: Config, architecture: Architecture, step: Step) -> int:
    """What the forward pass keeps for the backward pass, over all layers.

    arXiv:2205.05198, section 4.1, counts what training a whole model keeps. A frozen linear layer keeps nothing of what
    it reads: its weight has no gradient. What is left is what norms, attention and the activation function keep, and
    what the adapter reads. Checkpointing keeps the input of each layer (arXiv:1604.06174).
    """
    # The chosen hidden states, their copy and their gradient.
    ends = 3 * architecture.width * step.size * step.tokens
    copies = 0
    if step.is_cast and config.adapter.method in ("lora", "qlora"):
        copies = 2 * num_trained(config.adapter, architecture)
    if step.num_prefix:
        ends += 2 * architecture.num_layers * architecture.keys * step.micro * step.num_prefix * step.size
    if step.has_mask:
        ends += step.tokens * step.keys
    if config.model.gradient_checkpointing:
        return architecture.num_layers * architecture.width * step.size * step.tokens + ends + copies
    return _kept(config, architecture, step) + ends + copies


def _kept(config: Config, architecture: Architecture, step: Step) -> int:
    """What all layers keep where nothing is computed again."""
    base = architecture.num_layers * _base_bytes(architecture, step)
    return base + _adapter_bytes(config.adapter, architecture, step)


def _base_bytes(architecture: Architecture, step: Step) -> int:
    """What one frozen layer keeps, because a gradient must pass through it."""
    width, inner, queries, keys = architecture.width, architecture.inner, architecture.queries, architecture.keys
    # Norms keep what they read and a number or two a token; RMSNorm in fp32, whatever the model's dtype.
    norms = 2 * width * step.size + 4 * step.size if architecture.is_gpt2 else 2 * width * 4 + 8
    # GPT-2's activation function is written out: tanh and its polynomial keep four arrays. Llama's gated one keeps the
    # gate before and after it, and what it is multiplied with.
    feedforward = (4 if architecture.is_gpt2 else 3) * inner * step.size
    # Queries, keys, values and output of attention, and the sums of its softmax in fp32.
    attention = (2 * queries + 2 * keys) * step.size + 4 * architecture.num_heads
    if architecture.is_gpt2 and step.num_prefix:
        attention += 2 * keys * step.size * step.keys // step.length
    elif step.has_mask and not architecture.is_gpt2:
        # With a mask, keys and values are repeated for every head that shares them.
        attention += 2 * (queries * step.keys // step.length - keys) * step.size
        if step.num_prefix and architecture.num_kv_heads < architecture.num_heads:
            # The cache, in which the prefix stands, holds them once more.
            attention += 2 * keys * step.size * step.keys // step.length
    if architecture.has_qk_norm:
        norms += 4 * (queries + keys)
    if architecture.is_fused and not step.has_mask:
        # Values are a view of what the one matrix gave, which is kept whole beside the turned queries and keys.
        attention += (queries + keys) * step.size
    if step.has_mask:
        # Attention turns the mask into numbers, in every layer.
        attention += step.keys * step.size
    return step.tokens * (norms + feedforward + attention)


def _adapter_bytes(adapter: Adapter, architecture: Architecture, step: Step) -> int:
    """What the adapter keeps in all layers: LoRA the input of A and of B, (IA)3 what it scales.

    Dropout keeps for each layer the input it thinned, and its mask. DoRA scales the outputs of base and adapter.
    """
    linears = targeted(adapter, architecture)
    if adapter.method == "ia3":
        before = [x for x in linears if is_scaled_before(adapter, x)]
        after = [x for x in linears if not is_scaled_before(adapter, x)]
        return step.tokens * (4 * sum(x.inputs for x in before) + step.size * sum(x.outputs for x in after))
    each = sum(x.inputs for x in linears)
    # Layers that read the same share it; the output of attention is kept already.
    shared = sum({(x.layer, x.source): x.inputs for x in linears if x.source != "heads"}.values())
    inputs = each if step.is_cast or adapter.dropout else shared
    saved = step.size * (inputs + adapter.r * len(linears) + adapter.dora * 2 * sum(x.outputs for x in linears))
    return step.tokens * (saved + (each * step.mask_size if adapter.dropout else 0))


def head_bytes(architecture: Architecture, step: Step) -> int:
    """A chunk of the head: logits, their log-softmax and two gradients in fp32 (see `launcher.loss`)."""
    return min(CHUNK, step.tokens) * architecture.vocabulary * 16


def backward_bytes(config: Config, architecture: Architecture, step: Step) -> int:
    """The gradients that pass through one layer; where it was computed again what it keeps, and a 4-bit matrix in full.

    The gradients amount to two fp32 arrays as wide as the feed-forward block, or four in bf16: found by measuring.
    """
    largest = max(x.inputs * x.outputs for x in architecture.linears()) if config.quant.bits else 0
    again = _kept(config, architecture, step) // architecture.num_layers if config.model.gradient_checkpointing else 0
    return 8 * architecture.inner * step.tokens + largest * step.size + again
