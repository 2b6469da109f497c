"""Rates, waiting times, and what Prometheus reads of them."""

import math

import pytest

from serve.figures import Figures, percentile, prometheus


@pytest.mark.parametrize(
    ("samples", "percent", "value"),
    [
        # The example of the textbooks.
        ([50, 15, 40, 35, 20], 5, 15),
        ([50, 15, 40, 35, 20], 30, 20),
        ([50, 15, 40, 35, 20], 40, 20),
        ([50, 15, 40, 35, 20], 50, 35),
        ([50, 15, 40, 35, 20], 100, 50),
        ([3, 1], 0, 1),
        ([3, 1], 50, 1),
        ([3, 1], 51, 3),
        *[(range(1, 101), percent, percent) for percent in (1, 50, 95, 99, 100)],
    ],
)
def test_a_percentile_is_the_sample_of_the_nearest_rank(samples: list[float], percent: float, value: float) -> None:
    assert percentile(samples, percent) == value


def test_without_samples_there_is_no_percentile() -> None:
    assert math.isnan(percentile([], 50))
    # NaN is no JSON.
    assert Figures().summary()["first_token_ms"] == {"p50": None, "p95": None}


def test_figures_as_prometheus_reads_them() -> None:
    figures = Figures()
    assert 100 <= figures.retry_after_ms(64) <= 30_000
    figures.token(1, 0.25, is_first=True)
    figures.token(4, 0.00204, is_first=False)
    figures.ended("stop")
    status = {
        **dict.fromkeys(("busy_slots", "num_slots", "waiting", "clients"), 3),
        "engines": [{"rss_bytes": 7}],
        **figures.summary(),
    }
    assert (status["tokens"], status["tokens_per_second"]) == (5, 0.5)
    assert status["inter_token_ms"] == {"p50": 2.0, "p95": 2.0}
    lines = prometheus(status).splitlines()
    assert {
        "afinar_waiting 3",
        'afinar_first_token_ms{quantile="p50"} 250.0',
        "# TYPE afinar_tokens_total counter",
    } <= set(lines)
    assert lines.count("# TYPE afinar_first_token_ms gauge") == 1
