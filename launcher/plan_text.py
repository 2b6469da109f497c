"""A plan in words: what `make plan` prints."""

from dataclasses import fields

from launcher.arithmetic import num_steps
from launcher.choices import Choice
from launcher.config import Config
from launcher.hardware import GIB
from launcher.memory import Memory
from launcher.plan import Plan


def plan_lines(config: Config, decided: Plan, num_examples: int) -> list[str]:
    """What will run, ending with the command that it is."""
    batch = f"{decided.micro} x {decided.accumulation} x {decided.world}"
    processes = f"{decided.world} process{'es' * (decided.world > 1)}"
    environment = " ".join(f"{name}={value}" for name, value in decided.env.items())
    return [
        f"model      {config.model.name}, {decided.dtype}{', 4-bit base' if config.quant.bits else ''}",
        f"method     {config.adapter.method}",
        f"data       {config.data.source}, {num_examples} training examples",
        f"strategy   {decided.strategy}, {processes}",
        *(f"           {line}" for choice in decided.choices for line in _weighed(choice, decided)),
        f"batch      {config.batch.size} = {batch} (micro x accumulation x processes)",
        f"steps      {num_steps(config, num_examples)}, of at most {config.batch.size * decided.longest:,} tokens each",
        *([f"memory     {memory_words(decided.memory)}"] if decided.memory else []),
        *(f"note       {note}" for note in (*decided.notes, *decided.doubts)),
        f"command    {environment} {' '.join(decided.argv)}",
    ]


def first_lines(decided: Plan) -> list[str]:
    """What `make train` says of the plan; the program that follows says the rest."""
    memory = [f"plan: {decided.strategy}, {memory_words(decided.memory)}"] if decided.memory else []
    return memory + [f"note: {doubt}" for doubt in decided.doubts]


def _weighed(choice: Choice, decided: Plan) -> list[str]:
    """One line a strategy that was weighed, where there was a choice."""
    if len(decided.choices) == 1:
        return []
    name = choice.strategy.name
    if choice.refusal:
        return [f"{name:14} not legal: {choice.refusal}"]
    verdict = "does not fit" if not choice.fits else "taken" if name == decided.strategy else "fits"
    where = f" a process at micro {choice.micro}" if choice.memory else ""
    return [f"{name:14} {verdict}: {choice.need}{where}"]


def memory_words(memory: Memory) -> str:
    """Total and parts, per process, the large ones first."""
    parts = {field.name: getattr(memory, field.name) for field in fields(memory) if field.name != "host"}
    named = sorted(((size, name) for name, size in parts.items()), reverse=True)
    host = f"; {_size(memory.host)} of host memory" if memory.host else ""
    return (
        f"{_size(memory.total)} a process: {', '.join(f'{name} {_size(size)}' for size, name in named if size)}{host}"
    )


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
