"""Tokenising."""

import pytest

from launcher.encoding import encode
from launcher.errors import UserError

GOOD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_an_example_that_is_too_long_is_an_error_with_both_numbers(tokenizer):
    long = [{"role": "user", "content": "latte " * 100}, {"role": "assistant", "content": "ok"}]
    with pytest.raises(UserError, match=r"1 of 2 examples are longer than 50 tokens \(longest: \d+\)"):
        encode(tokenizer, [GOOD, long], 50)
