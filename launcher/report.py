"""What a person sees while a run goes on (rank 0 only), and metrics.jsonl and loss.png, which stay."""

import contextlib
import json
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from launcher.effort import Pace, duration
from launcher.failures import is_disk_full

if TYPE_CHECKING:
    from launcher.held_out import Evaluation

LINE_EVERY_S = 15.0
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
# Newline and tab, and what joins emoji.
KEPT = "\n\t\u200d"


class JsonLines:
    """A file that grows by a JSON object a line. What a full disk does not take is kept, and written before the next one."""

    def __init__(self, path: Path, *, is_continued: bool) -> None:
        # Unbuffered: a write says how much of it has reached the file.
        self._file = path.open("ab", buffering=0)
        # Whatever an earlier attempt left unfinished ends here.
        self._owed = b"\n" if is_continued else b""

    def add(self, record: dict[str, Any]) -> None:
        """Append one line, and what is still owed before it."""
        self._owed += (json.dumps(record, ensure_ascii=False) + "\n").encode()
        self._pay()

    def close(self) -> None:
        """Try once more to write what is owed."""
        self._pay()
        self._file.close()

    def _pay(self) -> None:
        try:
            self._owed = self._owed[self._file.write(self._owed) :]
        except OSError as error:
            if not is_disk_full(error):
                raise


class Report:
    """A progress bar on a terminal, a plain line now and then elsewhere; silent on every rank but the first."""

    def __init__(self, run_dir: Path, pace: Pace, start: int, *, is_main: bool) -> None:
        self.console = Console(quiet=not is_main, highlight=False)
        self.pace = pace
        names = (METRICS, EVALUATIONS) if is_main else ()
        self._files = {name: JsonLines(run_dir / name, is_continued=start > 0) for name in names}
        self._last_line = time.monotonic()
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=pace.effort.num_steps, completed=start)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        for file in self._files.values():
            file.close()

    def say(self, text: str) -> None:
        """One plain line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def evaluation(self, found: "Evaluation | None") -> None:
        """Tell and record one evaluation, unless it was broken off."""
        if found is None:
            return
        if self._files:
            self._files[EVALUATIONS].add(found.record())
        self.pace.add_evaluation(found.seconds, found.read_s)
        for line in found.lines():
            self.say(line)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Record one step: `loss` in nats a token, `tokens`, `step_s`, `tokens_per_s` over all processes, and what else was measured."""
        if self._files:
            self._files[METRICS].add({"step": step, **metrics})
        self.pace.add_step(metrics["step_s"], metrics["tokens"])
        words = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_s']:.0f} tokens/s"
        left = f"about {duration(self.pace.left(step))} left"
        self._bar.update(self._task, completed=step, description=f"{words}  {left}")
        now, num_steps = time.monotonic(), self.pace.effort.num_steps
        is_due = now - self._last_line > LINE_EVERY_S or self.pace.is_first_known or step == num_steps
        if not self.console.is_terminal and is_due:
            self._last_line = now
            self.say(f"step {step}/{num_steps}  {words}  {left}")


def printable(text: str) -> str:
    """The text with control characters as visible escapes: models and data may hold any, and terminals obey some."""
    return "".join(c if c.isprintable() or c in KEPT else c.encode("unicode_escape").decode() for c in text)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one a step; where a resumed run did a step again, the later one."""
    return _read_by_step(run_dir / METRICS)


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl, in the same way."""
    return _read_by_step(run_dir / EVALUATIONS) if (run_dir / EVALUATIONS).exists() else []


def _read_by_step(path: Path) -> list[dict[str, Any]]:
    by_step = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        # A line torn by a crash is not worth a run.
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]
