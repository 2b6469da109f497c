"""The loss: negative log-likelihood of the trained tokens, with the head run on those positions only.

The vocabulary is the largest dimension of a small batch: full logits of 16 x 100 tokens over 49,152 words are 300 MB. So
the head sees only the positions that carry loss, a chunk at a time, and because the head is frozen its gradient to the
hidden states is computed in the forward pass: no logits are ever kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from launcher.methods import bare, prefix_cache
from launcher.shards import gathered

CHUNK = 256


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of cross-entropies of `head(hidden)` against `targets`, without keeping logits."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
        """`hidden` [N, D], `targets` int64 [N] -> scalar fp32, the sum over N in nats."""
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        # Gathered once and used as a function: processes have different numbers of chunks, and must gather in step.
        with gathered(head.parameters()):
            for start in range(0, len(targets), CHUNK):
                part = hidden[start : start + CHUNK].detach().requires_grad_()
                with torch.enable_grad():
                    logits = F.linear(part, head.weight, head.bias).float()
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

    def __init__(self, model: PeftModel | PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        documents: torch.Tensor,
        trained: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `batches.collate` makes, [B, L] each -> fp32 sum of the loss, in nats.

        Position t predicts token t + 1, so it is token t + 1 that must be `trained`.
        """
        hidden, targets = self._read(input_ids, documents, trained, positions)
        return FrozenHeadLoss.apply(hidden, targets, self._head)

    @torch.no_grad()
    def predictions(self, **batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss fp32 [N] in nats, likeliest token int64 [N]) at each of the N trained positions, row by row."""
        hidden, targets = self._read(**batch)
        losses, tokens = [], []
        for part, target in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = self._head(part).float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            tokens.append(logits.argmax(-1))
        return torch.cat(losses), torch.cat(tokens)

    @property
    def _head(self) -> Any:
        return bare(self.model).get_output_embeddings()

    def _read(
        self,
        input_ids: torch.Tensor,
        documents: torch.Tensor,
        trained: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states [N, D] where a trained token is predicted, these tokens int64 [N])."""
        prefix = prefix_cache(self.model, len(input_ids))
        num_prefix = prefix.get_seq_length() if prefix else 0
        reads = documents.clamp(max=1) if positions is None else _within_documents(documents)
        hidden = bare(self.model).get_decoder()(
            input_ids=input_ids,
            attention_mask=F.pad(reads, (num_prefix, 0), value=1),
            position_ids=None if positions is None else positions + num_prefix,
            past_key_values=prefix,
            use_cache=prefix is not None,
        )[0]
        predicts = trained[:, 1:]
        return hidden[:, :-1][predicts], input_ids[:, 1:][predicts]


def unwrapped(model: Any) -> Trainee:
    """The `Trainee` inside DDP or DeepSpeed. accelerate would import all of DeepSpeed to see whether it is there."""
    return model if isinstance(model, Trainee) else unwrapped(model.module)


def _within_documents(documents: torch.Tensor) -> torch.Tensor:
    """Document numbers [B, L] -> bool [B, 1, L, L]: a token reads its own document up to itself, and no other."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()
