"""The engine without a daemon: a model of random weights that nobody can talk to, and the turns of an engine process."""

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.baselines import Baseline, Prompts, Result
from serve.engine import Engine, Sampling
from serve.errors import UserError
from serve.pace import Pace, num_read_together

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-7b": ("llama", {"max_position_embeddings": 4096}),
    "gpt-2": ("gpt2", {}),
    "smollm2-135m": (
        "llama",
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 2048,
        },
    ),
}  # fmt: skip


def random_model(shape: str, dtype: str, device: Any) -> Any:
    """A model of one of `SHAPES` with random weights; nf4 through bitsandbytes, all linear layers but the head."""
    if shape not in SHAPES:
        raise UserError(f"SHAPE={shape}: unknown; choose from: {', '.join(SHAPES)}")
    family, sizes = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **sizes), dtype=torch.float32 if dtype == "fp32" else torch.bfloat16
        ).eval()
    if dtype == "nf4":
        import bitsandbytes

        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
        for name, linear in linears:
            parent, _, child = name.rpartition(".")
            small = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            small.weight = bitsandbytes.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            small.bias = linear.bias
            setattr(model.get_submodule(parent), child, small.to(device))
    return model


def bare(engine: Engine) -> Baseline:
    """The turns of an engine process, without sockets and text."""

    def run(prompts: Prompts, num_tokens: int) -> Result:
        begun = time.perf_counter()
        stamps: list[list[float]] = [[] for _ in prompts]
        waiting = list(range(len(prompts)))
        # By slot: (number of the prompt, tokens that are not read), and numbers of those that are answered.
        reading: dict[int, tuple[int, int]] = {}
        answering: dict[int, int] = {}
        free = list(range(engine.info.num_slots))
        pace = Pace(engine.info.chunk)

        def take(slot: int, number: int, token: int) -> None:
            if token in engine.info.stop_ids:
                left = 0
            else:
                stamps[number].append(time.perf_counter() - begun)
                left = num_tokens - len(stamps[number])
            if left == 0:
                answering.pop(slot, None)
                engine.free(slot)
                free.append(slot)
            else:
                answering[slot] = number

        while waiting or reading or answering:
            while waiting and free:
                slot, number = free.pop(), waiting.pop(0)
                reused = engine.start(slot, list(prompts[number]), Sampling(), engine.info.adapters[0].key)
                reading[slot] = (number, len(prompts[number]) - reused)
            if reading:
                chunk = pace.chunk(len(answering))
                slots = list(reading)[: num_read_together([left for _, left in reading.values()], chunk)]
                for read in engine.prefill(slots, chunk):
                    number = reading[read.slot][0]
                    reading[read.slot] = (number, read.total - read.done)
                    if read.token is not None:
                        del reading[read.slot]
                        take(read.slot, number, read.token)
            if answering:
                for slot, token in engine.step().items():
                    take(slot, answering[slot], token)
        return Result(time.perf_counter() - begun, stamps)

    return run
