"""A share of many cases for the quick part of the suite; the whole suite takes them all."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(number: int, cases: Iterable[Any]) -> list[Any]:
    """Parameters, of which all but the first `number` are slow; a tuple is several values."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=[pytest.mark.slow] if i >= number else []) for i, row in enumerate(rows)]
