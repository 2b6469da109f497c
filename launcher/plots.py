"""Pictures of losses: of one run over its steps, of several over the tokens they have seen."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

MAX_SMOOTH = 10
LONGEST_NAME = 200


@dataclass(frozen=True)
class Curve:
    """Losses in nats a token, as (x, loss): of the training batches and of the held-out examples."""

    training: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]]


def draw_loss(curve: Curve, run_dir: Path) -> Path:
    """loss.png of one run, over its steps."""
    return _draw({"held out": curve}, run_dir / "loss.png", xlabel="step", title=run_dir.name)


def draw_curves(curves: Mapping[str, Curve], path: Path) -> Path:
    """Several runs by name over the tokens they have seen, as `path`.png with what a file name may not hold replaced."""
    name = re.sub(r"[^\w.-]+", "-", path.name, flags=re.ASCII)[:LONGEST_NAME]
    return _draw(curves, path.with_name(f"{name}.png"), xlabel="tokens seen", title="")


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and its neighbours, the fewer of them the fewer losses there are."""
    reach = min(MAX_SMOOTH, len(losses) // 10) // 2
    return [statistics.fmean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))]


def _draw(curves: Mapping[str, Curve], path: Path, *, xlabel: str, title: str) -> Path:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    shown: list[float] = []
    for number, (name, curve) in enumerate(curves.items()):
        color = f"C{number % 10}"
        losses = smooth([loss for _, loss in curve.training])
        axes.plot([x for x, _ in curve.training], losses, color=color, linewidth=0.8, alpha=0.6)
        points = [x for x, _ in curve.held_out], [loss for _, loss in curve.held_out]
        axes.plot(*points, "o-", color=color, markersize=5, linewidth=1.4, label=name)
        shown += [*losses, *points[1]]
    about = "Dots: held-out examples. Thin: training batches."
    axes.set(xlabel=xlabel, ylabel="loss (nats a token)", title=f"{title}. {about}" if title else about)
    _scale(axes, shown)
    axes.grid(visible=True, alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _scale(axes: Axes, shown: Sequence[float]) -> None:
    """Logarithmic where the losses span more than a factor of ten."""
    if max(shown) > 10 * min(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter())
