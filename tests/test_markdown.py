"""Markdown as finished rows: what each construct looks like, when a row is finished, and what a token costs."""

import random
import re
import subprocess
import sys

import pytest

from serve.chat import highlight
from serve.chat.markdown import LIVE_ROWS, Markdown
from serve.chat.width import Span, cells, columns
from tests.support.share import first

SGR = re.compile(r"\x1b\[[0-9;]*m")


def render(text: str, width: int = 40, has_colour: bool = False, cuts: tuple[int, ...] = ()) -> list[str]:
    markdown = Markdown(lambda: width, has_colour=has_colour)
    rows: list[str] = []
    start = 0
    for end in (*cuts, len(text)):
        rows += markdown.feed(text[start:end])
        assert len(markdown.live) <= LIVE_ROWS
        assert all(columns(cells([Span(SGR.sub("", row))])) <= width for row in markdown.live)
        start = end
    return rows + markdown.finish()


def coloured(text: str, width: int = 40) -> list[str]:
    """Rows with <codes> for escapes, to be read."""
    return [re.sub("\x1b\\[([0-9;]*)m", r"<\1>", row) for row in render(text, width, True)]


def plain(text: str, width: int = 40) -> list[str]:
    return [SGR.sub("", row) for row in render(text, width, True)]


def test_a_paragraph_streams_out_row_by_row():
    markdown = Markdown(lambda: 20, has_colour=True)
    assert markdown.feed("one two three four f") == []
    assert markdown.live == ["one two three four f"]
    assert markdown.feed("i") == ["one two three four"]
    assert markdown.live == ["fi"]
    assert markdown.feed("ve\nsix") == ["five"]
    assert markdown.finish() == ["six"]
    assert markdown.live == []


def test_line_breaks_are_kept_and_blank_lines_collapse():
    assert render("\n\na\nb\n\n\n\nc\n\n") == ["a", "b", "", "c"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a **b c** d", "a <1>b c<0> d"),
        ("*a* _b_ ~~c~~ ***d***", "<3>a<0> <3>b<0> <9>c<0> <1;3>d<0>"),
        ("**a *b* c**", "<1>a <0><1;3>b<0><1> c<0>"),
        ("**a *b***", "<1>a <0><1;3>b<0>"),
        ("*a **b** c*", "<3>a <0><3;1>b<0><3> c<0>"),
        ("`a **b** c` d", "<36>a **b** c<0> d"),
        ("`` a ` b ``", "<36>a ` b<0>"),
        ("**a `b**c` d**", "<1>a <0><1;36>b**c<0><1> d<0>"),
        ("这是**重点**内容", "这是<1>重点<0>内容"),
        ("**word**s", "<1>word<0>s"),
        ("snake_case_name 2 * 3 * 4 2**3**4 a*b*c", "snake_case_name 2 * 3 * 4 2**3**4 a*b*c"),
        ("__init__ *.py and *.js (a * b)", "__init__ *.py and *.js (a * b)"),
        ("open **for ever", "open **for ever"),
        ("`open for ever", "`open for ever"),
        (r"\*a\* \(x\) C:\new", r"*a* \(x\) C:\new"),
        ("[a b](http://x/y_z_(1)) c", "<4>a b<0><2> (http://x/y_z_(1))<0> c"),
        ("[1] [ ] [a] (b)", "[1] [ ] [a] (b)"),
        ("![alt](x.png)", "!<4>alt<0><2> (x.png)<0>"),
    ],
)
def test_inline(text, expected):
    assert "".join(coloured(text, 80)) == expected


def test_a_marker_waits_for_one_row_and_is_then_shown():
    rows = coloured("**a sentence that is longer than one row**, and more", 20)
    assert rows == ["<1>**a sentence that is<0>", "<1>longer than one<0>", "<1>row**<0>, and more"]
    rows = coloured("**kwargs are never closed here\nnext line", 20)
    assert rows == ["<1>**kwargs are never<0>", "<1>closed here<0>", "next line"]
    assert coloured("_private is a name, not italic", 20) == ["_private is a name,", "not italic"]


def test_without_colour_markers_stay():
    text = "# T\n**a** `b` ~~c~~ \\* [d](e)\n> *f*\n- g"
    assert render(text) == ["# T", "**a** `b` ~~c~~ \\* d (e)", "│ *f*", "• g"]


def test_headings():
    assert coloured("# A *b*\ntext\n## C\n### D") == [
        "<1;4>A <0><1;4;3>b<0>",
        "text",
        "",
        "<1;35>C<0>",
        "<1>D<0>",
    ]
    assert render("#hashtag") == ["#hashtag"]


def test_lists_nest_by_indentation_and_hang():
    text = (
        "- one two three four five\n  - [x] nested\n    1. deep\n       still deep\n* top\n10) ten words in this item"
    )
    assert render(text, 16) == [
        "• one two three",
        "  four five",
        "  • [x] nested",
        "    1. deep",
        "       still",
        "       deep",
        "• top",
        "10) ten words in",
        "    this item",
    ]


def test_quotes():
    assert render("> one two three\n>\n> > in\n> - item\n\nout", 12) == [
        "│ one two",
        "│ three",
        "│",
        "│ │ in",
        "│ • item",
        "",
        "out",
    ]
    assert render("- a\n  > b") == ["• a", "  │ b"]


def test_rules():
    assert render("a\n---\n* * *\n--- b", 10) == ["a", "─" * 10, "─" * 10, "--- b"]


def test_code_is_not_wrapped_and_keeps_its_blank_lines():
    text = "text\n```python\nif x:\n\n\n\ty = '" + "z" * 50 + "'\n```\nmore"
    assert render(text) == ["text", "", "── python", "  if x:", "", "", "      y = '" + "z" * 50 + "'", "", "more"]


def test_fences_of_any_kind():
    assert render("````\n```\n````") == ["  ```"]
    assert render("~~~ a b\nx ~~~\n~~~~~") == ["── a b", "  x ~~~"]
    assert render("```x``` is code") == ["```x``` is code"]
    assert render("1. a\n   ```sh\n   ls\n     -l\n   ```\n2. b") == [
        "1. a",
        "",
        "   ── sh",
        "     ls",
        "       -l",
        "",
        "2. b",
    ]
    assert render("> ```\n> x\nout") == ["│   x", "", "out"]
    assert render("```\nnever closed") == ["  never closed"]


def test_code_is_highlighted_across_lines():
    rows = coloured('```python\ndef f():\n    """one\n    two"""\n    return 1\n```')
    assert rows[1] == "  <35>def<0> <1>f<0>():"
    assert rows[3] == "  <32>    two" + '"""<0>'
    assert coloured("```nothing\nif x: 1\n```")[1] == "  if x: 1"


def test_the_line_of_code_in_work_has_its_colours():
    markdown = Markdown(lambda: 40, has_colour=True)
    markdown.feed('```python\n"""\nif')
    assert markdown.live == ["  \x1b[32mif\x1b[0m"]
    markdown.feed('\n"""\n``')
    assert markdown.live == []


def test_a_lexer_that_fails_or_never_ends_leaves_the_text(monkeypatch):
    def circle(*_):
        raise RecursionError

    monkeypatch.setattr(highlight, "_tokens", circle)
    assert plain("```python\nif x: 1\n```") == ["── python", "  if x: 1"]


def test_a_lexer_in_a_circle_is_ended():
    from pygments.lexer import RegexLexer, default

    class Circle(RegexLexer):
        tokens = {"root": [default("other")], "other": [default("#pop")]}  # noqa: RUF012

    with pytest.raises(RecursionError):
        highlight._tokens(Circle(), "x\n", ["root"])


TABLE = "| Name | n |\n|:--|--:|\n| **a** | 1 |\n| 中文 | `x|y` |\n"


def test_tables():
    assert plain("text\n" + TABLE + "more") == [
        "text",
        "",
        "Name │   n",
        "─────┼────",
        "a    │   1",
        "中文 │ x|y",
        "",
        "more",
    ]


def test_a_table_is_live_until_it_ends():
    markdown = Markdown(lambda: 40, has_colour=False)
    assert markdown.feed("a\n" + TABLE + "| p") == ["a"]
    assert markdown.live == ["| Name | n |", "|:--|--:|", "| **a** | 1 |", "| 中文 | `x|y` |", "| p"]
    assert len(markdown.feed(" | q |\n\n")) == 6


def test_wide_tables_are_wrapped_and_ruled():
    assert plain("| a | b |\n|---|---|\n| x | one two three four |\n| y<br>z | w |", 16) == [
        "a │ b",
        "──┼─────────────",
        "x │ one two",
        "  │ three four",
        "──┼─────────────",
        "y │ w",
        "z │",
    ]


def test_tables_too_wide_for_the_screen_are_records():
    text = "|" + "|".join(f" head{i} " for i in range(5)) + "|\n" + "|---" * 5 + "|\n" + "| one two " * 5 + "|\n"
    assert plain(text, 20) == [f"head{i}: one two" for i in range(5)]


def test_long_tables_stream_after_forty_rows():
    markdown = Markdown(lambda: 40, has_colour=False)
    assert markdown.feed("| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 39) == []
    assert len(markdown.feed("| 1 | 2 |\n")) == 42
    assert markdown.feed("| 3 | 4 |\n") == ["3 │ 4"]
    assert markdown.feed("| longer | 4 |\n")[0].startswith("l │ 4")
    assert markdown.live == []


def test_pipes_that_are_no_table():
    assert render("| a | b |\nmore") == ["| a | b |", "more"]
    assert render("|x| is absolute\n|y| too") == ["|x| is absolute", "|y| too"]
    assert render("| a |\n|---|\n| 1 | 2 | 3 |\n| |") == ["a", "─────────", "1 | 2 | 3", ""]


def test_the_width_is_asked_for_each_row():
    size = [40]
    markdown = Markdown(lambda: size[0], has_colour=False)
    assert markdown.feed("one two three four") == []
    size[0] = 10
    assert markdown.live == ["one two", "three four"]
    assert markdown.feed(" five") == ["one two", "three four"]


SAMPLE = (
    "# Title **bold**\n\nThe quick *brown* fox, `code` and [link](http://x.y/z_(1)) in a paragraph.\n中文，段落👩\u200d👩\u200d👧 ❤\ufe0f e\u0301\n"
    "- a\n  - b **c\n    ```py\n    def f(): return '中'  # x\n    ```\n1. > q\n\n" + TABLE + "\n~~~\n\tx\n\n~~~\r\n"
    "---\n> a\n>\n> - b\n\x1b[31m\ttail **open *and `more"
)
PIECES = [
    *[
        "**",
        "*",
        "***",
        "_",
        "~~",
        "`",
        "``",
        "```",
        "```python\n",
        "~~~\n",
        "\n",
        "\n",
        "\n\n",
        "- ",
        "1. ",
        "  ",
        "> ",
    ],
    *["| a | b |\n", "|---|--:|\n", "| c", "|", "[x](", "[", "](u)", ")", "# ", "word ", "snake_case", "中文，", "\\"],
    *[
        "👩\u200d👩\u200d👧",
        "❤\ufe0f",
        "🇪🇸",
        "e\u0301",
        "\u200d",
        "\x1b[31m",
        "\r",
        "\r\n",
        "\t",
        "long" * 15,
        "---\n",
        "<br>",
    ],
]


@pytest.mark.parametrize(
    ("width", "has_colour"), first(2, [(10, True), (80, False), (10, False), (40, True), (40, False), (80, True)])
)
def test_rows_do_not_depend_on_the_cuts(width, has_colour):
    whole = render(SAMPLE, width, has_colour)
    assert render(SAMPLE, width, has_colour, tuple(range(1, len(SAMPLE)))) == whole
    for at in range(1, len(SAMPLE)):
        assert render(SAMPLE, width, has_colour, (at,)) == whole


@pytest.mark.parametrize("seed", first(15, range(60)))
def test_random_text_with_random_cuts(seed):
    chance = random.Random(seed)
    text = "".join(chance.choice(PIECES) for _ in range(80))
    width, has_colour = chance.choice([10, 20, 80]), chance.random() < 0.7
    whole = render(text, width, has_colour)
    assert render(text, width, has_colour, tuple(range(1, len(text)))) == whole
    for _ in range(3):
        assert render(text, width, has_colour, tuple(sorted(chance.sample(range(len(text)), 8)))) == whole
    assert all("\x1b" not in SGR.sub("", row) and "\n" not in row for row in whole)


@pytest.mark.parametrize("seed", first(10, range(30)))
def test_no_word_is_lost_or_doubled(seed):
    chance = random.Random(seed)
    text = "".join(f"{chance.choice(PIECES)} w{number}w " for number in range(60))
    # Too narrow a table repeats its header in every record: a wide screen has none.
    found = re.findall(r"w\d+w", " ".join(plain(text, 400)))
    assert sorted(found) == sorted(f"w{number}w" for number in range(60))


def test_each_character_of_code_is_lexed_once(monkeypatch):
    lexed = []
    tokens = highlight._tokens
    monkeypatch.setattr(
        highlight, "_tokens", lambda lexer, text, stack: lexed.append(text) or tokens(lexer, text, stack)
    )
    code = '    value = compute(1, "two")  # three\n' * 2000
    render("```python\n" + code + "```\n", has_colour=True)
    assert sum(len(text) for text in lexed) == len(code)


def test_a_token_costs_the_same_at_the_end_of_a_long_text(monkeypatch):
    from serve.chat import prose

    laid_out = []
    fill = prose.fill
    monkeypatch.setattr(prose, "fill", lambda row, limit: laid_out.append(len(row)) or fill(row, limit))
    text = "one **two** three `four` five " * 2000
    render(text, 40, True)
    assert max(laid_out) <= 41 + 40 and len(laid_out) <= len(text)


def test_pygments_is_not_imported_before_the_first_block():
    program = (
        "import sys; from serve.chat.markdown import Markdown; m = Markdown(lambda: 80, has_colour=True); m.feed('a **b**\\n');"
        "assert 'pygments' not in sys.modules; m.feed('```python\\nx\\n'); assert 'pygments' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
