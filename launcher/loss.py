"""The loss: negative log-likelihood of the trained tokens, with the head run on those positions only.

The vocabulary is the largest dimension of a small batch: full logits of 16 x 100 tokens over 49,152 words are 300 MB. So
the head sees only the positions that carry loss, a chunk at a time, and because the head is frozen its gradient to the
hidden states is computed in the forward pass: no logits are ever kept.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel

from launcher.batches import collate
from launcher.encoding import Example, count_trained

CHUNK = 256


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of cross-entropies of `head(hidden)` against `targets`, without keeping logits."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
        """`hidden` [N, D], `targets` int64 [N] -> scalar fp32, the sum over N in nats."""
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(targets), CHUNK):
            part = hidden[start : start + CHUNK].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(part).float()
                loss = F.cross_entropy(logits, targets[start : start + CHUNK], reduction="sum")
            (gradient[start : start + CHUNK],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Scale the stored gradient by the incoming one."""
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


class Trainee(torch.nn.Module):
    """The module that is trained: a batch in, its summed loss out."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        """`input_ids`, `attention_mask` int64 [B, L], `trained` bool [B, L] -> fp32 sum of the loss, in nats.

        Position t predicts token t + 1, so it is token t + 1 that must be `trained`.
        """
        base = self.model.get_base_model()
        hidden = base.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        predicts = trained[:, 1:]
        return FrozenHeadLoss.apply(hidden[:, :-1][predicts], input_ids[:, 1:][predicts], base.get_output_embeddings())


@torch.no_grad()
def summed(
    trainee: Callable[..., torch.Tensor], examples: list[Example], micro: int, device: torch.device
) -> tuple[float, int]:
    """(sum of the loss in nats, number of trained tokens) of `examples`, `micro` of similar length at a time."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    parts = [ordered[first : first + micro] for first in range(0, len(ordered), micro)]
    return sum(trainee(**collate(part, device)).item() for part in parts), count_trained(examples)
