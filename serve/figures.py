"""How the daemon is doing: counts, rates and waiting times, and the same as text for Prometheus. Pure."""

import math
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable

WINDOW_SECONDS = 10.0
MAX_SAMPLES = 512


class Figures:
    """Counts since the start; rates over the last ten seconds; times of the newest samples, in milliseconds."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.endings: Counter[str] = Counter()
        self.tokens = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._ended: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._first: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._between: deque[float] = deque(maxlen=MAX_SAMPLES)

    def token(self, number: int, waited: float, *, is_first: bool) -> None:
        """So many tokens came, `waited` seconds after the request or after the ones before."""
        self.tokens += number
        self._recent.append((time.monotonic(), number))
        (self._first if is_first else self._between).append(waited * 1e3)
        self._trim()

    def ended(self, how: str) -> None:
        """A request is over: a reason, or the code of an error."""
        self.endings[how] += 1
        self._ended.append(time.monotonic())

    def retry_after_ms(self, waiting: int) -> int:
        """When a place in the queue should be free again, by the pace of the last endings."""
        span = time.monotonic() - self._ended[0] if len(self._ended) > 1 else 1.0
        each = span / max(len(self._ended), 1)
        return int(min(max(1e3 * each * max(1, waiting / 8), 100), 30_000))

    def summary(self) -> dict[str, object]:
        """What STATUS says of it."""
        self._trim()
        return {
            "uptime_s": round(time.monotonic() - self.started, 1),
            "requests": dict(self.endings),
            "tokens": self.tokens,
            "tokens_per_second": round(sum(number for _, number in self._recent) / WINDOW_SECONDS, 1),
            "first_token_ms": _percentiles(self._first),
            "inter_token_ms": _percentiles(self._between),
        }

    def _trim(self) -> None:
        while self._recent and time.monotonic() - self._recent[0][0] > WINDOW_SECONDS:
            self._recent.popleft()


def percentile(samples: Iterable[float], percent: float) -> float:
    """By nearest rank: the least of the samples that at least `percent` of a hundred do not exceed; NaN without samples."""
    ordered = sorted(samples)
    rank = math.ceil(len(ordered) * percent / 100)
    return ordered[max(rank, 1) - 1] if ordered else math.nan


def _percentiles(samples: Collection[float]) -> dict[str, float | None]:
    return {f"p{percent}": round(percentile(samples, percent), 1) if samples else None for percent in (50, 95)}


def prometheus(status: dict[str, object]) -> str:
    """The figures of STATUS in the text format of Prometheus."""
    lines: list[str] = []

    def add(name: str, kind: str, value: object, labels: str = "") -> None:
        if not any(line.startswith(f"# TYPE afinar_{name} ") for line in lines):
            lines.append(f"# TYPE afinar_{name} {kind}")
        lines.append(f"afinar_{name}{labels} {value}")

    for name in ("busy_slots", "num_slots", "waiting", "clients", "tokens_per_second"):
        add(name, "gauge", status[name])
    add("tokens_total", "counter", status["tokens"])
    requests = status["requests"]
    assert isinstance(requests, dict)
    for how, number in sorted(requests.items()):
        add("requests_total", "counter", number, f'{{ending="{how}"}}')
    for name in ("first_token_ms", "inter_token_ms"):
        times = status[name]
        assert isinstance(times, dict)
        for quantile, value in times.items():
            if value is not None:
                add(name, "gauge", value, f'{{quantile="{quantile}"}}')
    engines = status["engines"]
    assert isinstance(engines, list)
    for number, engine in enumerate(engines):
        add("engine_rss_bytes", "gauge", engine["rss_bytes"], f'{{engine="{number}"}}')
    return "\n".join(lines) + "\n"
