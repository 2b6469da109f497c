"""The evaluations during a run: held-out loss over all processes, and a few answers of the model as it is."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from launcher import measure
from launcher.chat import Message, prompt_ids
from launcher.config import Config
from launcher.effort import Effort
from launcher.job import Job, is_stop_agreed
from launcher.material import Material
from launcher.report import printable


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats a trained token, over `examples` held-out examples; greedy answers to the first few of them.

    `asked`, `wanted` and `answered` show one answer; `exact_match` is the share of `answers` that are right to the letter.
    All of it is None for plain text. It took `seconds`, and `read_s` of them to read the examples.
    """

    step: int
    loss: float
    examples: int
    answers: int = 0
    exact_match: float | None = None
    asked: str | None = None
    wanted: str | None = None
    answered: str | None = None
    seconds: float = 0.0
    read_s: float = 0.0

    @property
    def perplexity(self) -> float:
        """e to the loss: among how many tokens the model is as undecided as between equals."""
        return math.exp(min(self.loss, 700.0))

    def record(self) -> dict[str, Any]:
        """As it is written to evaluations.jsonl and into the manifest: without the times, which differ from run to run."""
        measured = {name: value for name, value in asdict(self).items() if name not in ("seconds", "read_s")}
        return {**measured, "perplexity": self.perplexity}

    def lines(self) -> list[str]:
        """As it is told to a person."""
        exact = f", {self.exact_match:.0%} of {self.answers} answers exact" if self.exact_match is not None else ""
        told = [f"step {self.step}: held-out loss {self.loss:.4f}, perplexity {self.perplexity:.4g}{exact}"]
        if self.asked is not None:
            told += [f"  asked:    {printable(self.asked)}", f"  answered: {printable(self.answered or '')}"]
        return told


def evaluate(job: Job, step: int) -> Evaluation | None:
    """Measure a part of the held-out split with the model as it is; None if the processes agreed to stop meanwhile.

    Every process must call this together.
    """
    begun = time.monotonic()
    job.model.eval()
    chosen = part(job.config, job.material)
    loss = mean_loss(job, chosen)
    if loss is None:
        return None
    read_s = time.monotonic() - begun
    found = answered(job, Evaluation(step, loss, len(chosen)), job.peft_model)
    job.accelerator.wait_for_everyone()
    job.model.train()
    return replace(found, seconds=round(time.monotonic() - begun, 3), read_s=round(read_s, 3))


def part(config: Config, material: Material) -> list[int]:
    """`eval.examples` of the held-out split: the longest, which shows what memory it takes, and the first ones."""
    lengths = material.held_out.lengths
    longest = int(lengths.argmax())
    others = [i for i in range(len(lengths)) if i != longest]
    return [longest, *others[: config.eval.examples - 1]]


def questions(config: Config, material: Material) -> list[list[Message]]:
    """The first `eval.answers` held-out conversations that can be asked; what was too long to train on is not."""
    asked = [m for m in material.splits.held_out if measure.has_answer(m)][: config.eval.answers]
    return [m for m in asked if measure.fits(material.tokenizer, m, material.longest)]


def effort(config: Config, material: Material, num_steps: int) -> Effort:
    """The work of a run of so many steps."""
    asked, lengths = questions(config, material), material.held_out.lengths
    prompts = sum(len(prompt_ids(material.tokenizer, m[:-1])) for m in asked)
    answers = len(asked) * measure.most_tokens(material.tokenizer, asked) if asked else 0
    learned = float(material.train.lengths.mean()) * config.batch.size
    read = int(lengths[part(config, material)].sum())
    return Effort(num_steps, learned, config.eval.every, read, prompts + answers, int(lengths.sum()))


def mean_loss(job: Job, chosen: Sequence[int]) -> float | None:
    """Mean loss in nats a trained token of these held-out examples, shared out over the processes.

    None if the processes agreed to stop meanwhile. All of them read equally many parts, some of them one in vain: under
    ZeRO-3 they gather the base together.
    """
    accelerator, device = job.accelerator, job.accelerator.device
    parts = measure.parts([job.material.held_out[i] for i in chosen], job.micro)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, len(parts), accelerator.num_processes):
        job.beat.at("the evaluation")
        if is_stop_agreed(job):
            return None
        mine = first + accelerator.process_index
        with accelerator.autocast():
            found = measure.summed_loss(job.model, parts[min(mine, len(parts) - 1)], device)
        if mine < len(parts):
            sums += torch.tensor(found, dtype=torch.float64, device=device)
    sums = accelerator.reduce(sums, "sum")
    return (sums[0] / sums[1]).item()


def answered(job: Job, found: Evaluation, model: Any) -> Evaluation:
    """The evaluation with the answers of `model` to the first held-out questions.

    The first process asks it; under ZeRO-3 all of them do, together.
    """
    if not (job.accelerator.is_main_process or job.is_base_sharded):
        return found
    asked = questions(job.config, job.material)
    if not asked:
        return found
    with job.accelerator.autocast():
        said = measure.answer(
            model.eval(), job.tokenizer, asked, job.material.stop_ids, job.accelerator.device, job.beat.tick
        )
    right = [messages[-1]["content"] for messages in asked]
    return replace(
        found, answers=len(asked), exact_match=measure.share_exact(said, right),
        asked=asked[0][-2]["content"], wanted=right[0], answered=said[0],
    )  # fmt: skip
