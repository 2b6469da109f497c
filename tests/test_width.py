"""Display width: graphemes, rows that are full, and the styles of a row."""

import pytest

from serve.chat.width import BOLD, Span, cells, columns, cut, fill, paint, wrapped


def rows(text: str, limit: int) -> list[str]:
    return [paint(row, False) for row in wrapped(cells([Span(text)]), limit)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc", 3),
        ("中文", 4),
        ("e\u0301", 1),
        ("👩\u200d👩\u200d👧", 2),
        ("❤", 1),
        ("❤\ufe0f", 2),
        ("🇪🇸🇫🇷", 4),
        ("👍🏽", 2),
        ("1\ufe0f\u20e3", 2),
        ("각", 2),
        ("", 0),
    ],
)
def test_the_columns_of_a_text(text, expected):
    assert columns(cells([Span(text)])) == expected


def test_a_grapheme_is_one_cell_wherever_its_spans_are_cut():
    assert [cell.text for cell in cells([Span("a👩"), Span("\u200d👩"), Span("\u200d👧b")])] == [
        "a",
        "👩\u200d👩\u200d👧",
        "b",
    ]


def test_a_letter_under_thousands_of_marks_still_makes_rows():
    row = cells([Span("a" + "\u0301" * 10_000)])
    assert max(len(cell.text) for cell in row) <= 32
    assert len(wrapped(row, 20)) > 10


def test_words_are_wrapped_and_long_ones_broken():
    assert rows("one two  three", 8) == ["one two", "three"]
    assert rows("see abcdefghijkl", 5) == ["see", "abcde", "fghij", "kl"]
    assert rows("", 5) == [""]


def test_wide_letters_break_anywhere_but_not_before_a_comma():
    assert rows("中文中文中文", 5) == ["中文", "中文", "中文"]
    assert rows("中文，中文", 4) == ["中", "文，", "中文"]
    assert rows("中（文）", 4) == ["中", "（文", "）"]


def test_no_row_is_wider_than_the_limit():
    for limit in range(2, 12):
        for row in wrapped(cells([Span("a 中文👩\u200d👩\u200d👧 ❤\ufe0f bcdefghijklmn 🇪🇸，x")]), limit):
            assert 0 < columns(row) <= limit


def test_a_row_is_full_only_when_something_does_not_fit():
    assert fill(cells([Span("abcd")]), 4) == ([], cells([Span("abcd")]))
    full, rest = fill(cells([Span("ab cde")]), 4)
    assert (paint(full[0], False), paint(rest, False)) == ("ab", "cde")


def test_code_is_cut_anywhere():
    assert [paint(row, False) for row in cut(cells([Span("ab 中文c")]), 4)] == ["ab ", "中文", "c"]


def test_a_row_closes_its_styles():
    row = cells([Span("a"), Span("b", BOLD), Span("c", "36")])
    assert paint(row, True) == "a\x1b[1mb\x1b[0m\x1b[36mc\x1b[0m"
    assert paint(row, False) == "abc"
