"""Nothing that a model writes reaches the terminal as a command: the only escapes are the renderer's own colours."""

import re

import pytest

from serve.chat.markdown import Markdown
from serve.chat.printable import printable

ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "title, ended by ST": "\x1b]2;owned\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "hyperlink": "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "palette": "\x1b]4;0;rgb:ff/ff/ff\x07",
    "working directory": "\x1b]7;file://host/etc\x07",
    "iTerm2 file": "\x1b]1337;File=inline=1:AAAA\x07",
    "notification": "\x1b]777;notify;a;b\x07",
    "prompt mark": "\x1b]133;A\x07",
    "cursor up": "\x1b[5A",
    "cursor home": "\x1b[H",
    "clear": "\x1b[2J\x1b[3J",
    "erase line": "\x1b[2K",
    "scroll region": "\x1b[1;3r",
    "alternate screen": "\x1b[?1049h",
    "bracketed paste off": "\x1b[?2004l",
    "mouse": "\x1b[?1003h",
    "hidden cursor": "\x1b[?25l",
    "conceal": "\x1b[8mhidden",
    "colour": "\x1b[31mred\x1b[0m",
    "full reset": "\x1bc",
    "soft reset": "\x1b[!p",
    "cursor report": "\x1b[6n",
    "device attributes": "\x1b[c",
    "answerback": "\x05",
    "DECRQSS": "\x1bP$qm\x1b\\",
    "sixel": "\x1bPq#0;2;0;0;0~-\x1b\\",
    "kitty graphics": "\x1b_Ga=T,f=24;AAAA\x1b\\",
    "privacy message": "\x1b^secret\x1b\\",
    "start of string": "\x1bXsecret\x1b\\",
    "tmux passthrough": "\x1bPtmux;\x1b\x1b]0;owned\x07\x1b\\",
    "screen title": "\x1bkowned\x1b\\",
    "window size": "\x1b[8;1;1t",
    "printer": "\x1b[5i",
    "C1 CSI": "\x9b31m",
    "C1 OSC": "\x9d0;owned\x9c",
    "C1 DCS": "\x90q~\x9c",
    "C1 APC, PM, SOS": "\x9f\x9e\x98",
    "C1 next line": "a\x85b",
    "bell": "\x07",
    "backspaces": "safe\x08\x08\x08\x08evil",
    "return": "safe\revil",
    "delete": "a\x7fb",
    "vertical tab, form feed": "a\x0bb\x0cc",
    "shift out": "\x0e\x0f",
    "null, substitute": "\x00\x1a\x18",
    "bidi override": "\u202egnp.exe\u202c",
    "bidi isolates": "\u2066a\u2069\u2067b\u2068",
    "bidi marks": "\u200ea\u200fb\u061c",
    "zero width": "a\u200bb\u2060c\ufeffd",
    "separators": "a\u2028b\u2029c",
    "tags": "a\U000e0041\U000e0042",
    "annotations": "\ufff9a\ufffab\ufffb",
    "surrogates": "\ud800\udc9b",
}
PLACES = {
    "alone": "{}",
    "in prose": "before {} after",
    "in bold": "**a {} b**",
    "in code": "`a {} b`",
    "heading": "# a {} b",
    "list": "- a {}\n  1. {}",
    "quote": "> a {} b",
    "table": "| {} | b |\n|---|---|\n| a | {} |\n\nend",
    "table's delimiter": "| a |\n|---{}|\n",
    "block": "```python\nx = '{}'\n{}\n```\n",
    "unknown language": "~~~nothing\n{}\n~~~\n",
    "info": "```python {}\nx\n```\n",
    "info alone": "```{}\nx\n```\n",
    "link": "[a {} b](http://{}/c)",
    "emphasis": "*{}* ~~{}~~ _{}_",
    "escaped": "\\{}",
    "rule": "---{}",
}
OURS = re.compile(r"\x1b\[[0-9]+(?:;[0-9]+)*m")
# What a terminal may act on, or what hides or reorders the text around it.
FORBIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
SETTINGS = {"0", "1", "2", "3", "4", "9", "31", "32", "35", "36"}


def check(row: str, has_colour: bool) -> None:
    assert not FORBIDDEN.search(OURS.sub("", row) if has_colour else row), ascii(row)
    for match in OURS.findall(row):
        assert set(match[2:-1].split(";")) <= SETTINGS
    assert row.rfind("\x1b[0m") == row.rfind("\x1b")


def rendered(feeds: list[str], has_colour: bool) -> list[str]:
    markdown = Markdown(lambda: 60, has_colour=has_colour)
    rows: list[str] = []
    for text in feeds:
        rows += markdown.feed(text)
        for row in markdown.live:
            check(row, has_colour)
    rows += markdown.finish()
    for row in rows:
        check(row, has_colour)
    return rows


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("has_colour", [True, False])
def test_nothing_of_an_attack_is_raw(attack, has_colour):
    for place in PLACES.values():
        text = place.replace("{}", attack)
        whole = rendered([text], has_colour)
        assert rendered([*text], has_colour) == whole


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_may_be_cut_anywhere(attack):
    for place in ("before {} after", "```python\nx = '{}'\n```\n", "| {} | b |\n|---|---|\n| a | {} |\n"):
        text = place.replace("{}", attack)
        whole = rendered([text], True)
        for at in range(1, len(text)):
            assert rendered([text[:at], text[at:]], True) == whole


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_is_shown(attack):
    """Hidden would be worse than ugly: the reader sees what the model wrote."""
    shown = printable(attack)
    assert not FORBIDDEN.search(shown)
    assert shown in "".join(rendered([f"```\n{attack}\n```\n"], False))


def test_what_people_write_stays_as_it_is():
    text = "Año, 中文, 👩\u200d👩\u200d👧, ❤\ufe0f, می\u200cخواهم, क्ष"
    assert printable(text) == text
    assert printable("a\tb\nc") == "a\tb\nc"


def test_the_line_ends_of_windows_are_line_ends():
    assert rendered(["a\r", "\nb\r\n", "c\r"], False) == ["a", "b", "c\\x0d"]
