"""What a checkpoint costs: how long training stands still for it, and how large it is.

    python -m bench.checkpoint [VARIABLE=value …] [section.option=value …]

Prints the median and the longest of nine, each after a step, and the size beside that of the adapter and the moments.
"""

import statistics
import tempfile
from pathlib import Path

from bench.train import timed
from bench.training import assembled
from launcher import checkpoint, loop, methods, models, shards
from launcher.compose import load
from launcher.errors import run_main
from launcher.job import load_model, save_checkpoint
from launcher.variables import parse

NUM_SAVES = 9


def main(args: list[str]) -> int:
    """Train a little, save often, and measure."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        config = load(parse([*args, f"RUN={folder}/run"]))
        job = assembled(config)
        with models.quiet():
            load_model(job)
        seconds = []
        for step in range(NUM_SAVES):
            loop.train_step(job, step)
            seconds.append(timed(lambda step=step: save_checkpoint(job, step + 1)))
        newest, _ = checkpoint.newest(config.run_dir)
        assert newest
        size = sum(file.stat().st_size for file in newest.folder.iterdir())
        methods.save(job.peft_model, Path(folder, "adapter"))
        adapter = sum(file.stat().st_size for file in Path(folder, "adapter").iterdir())
        trained = sum(map(shards.num_elements, job.parameters.values()))
    print(f"stands still {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s (longest of {NUM_SAVES})")
    share = size / (adapter + 12 * trained)
    print(f"{size:,} bytes: {share:.2f} x (adapter {adapter:,} + 12 x {trained:,} trained parameters)")
    return 0


if __name__ == "__main__":
    run_main(main)
