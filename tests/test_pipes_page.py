"""docs/pipes.md says what the code does: its examples are run, its flags, names and codes are all there are."""

import json
import re
from typing import Any

import pytest

from serve.chat import outputs
from serve.chat.flags import FLAGS, HELP
from serve.chat.sampling import NAMES
from serve.submission import Submission
from tests.serve_fixtures import ROOT, Box, box

__all__ = ["box"]
PAGE = (ROOT / "docs/pipes.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r'    echo "(.*)" \| python -m serve chat (.*)\n\n```json\n((?:.*\n)+?)```', PAGE)


def rows(head: str) -> dict[str, str]:
    """The rows of the table with this head, by their first cell."""
    table = PAGE.partition(f"| {head} |")[2].partition("\n\n")[0]
    return {row[0].strip("` "): row[1].strip() for row in (line[1:].split("|") for line in table.splitlines()[2:])}


def without_times(lines: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in lines.splitlines()]
    for each in found:
        each.update({"timings": sorted(each["timings"])} if "timings" in each else {})
    return found


@pytest.mark.parametrize("example", EXAMPLES, ids=[words for _, words, _ in EXAMPLES])
def test_the_examples_are_what_comes(box: Box, example: tuple[str, str, str]) -> None:
    question, words, shown = example
    # Slowly, so that every token has a piece of its own.
    box.daemon(0.02)
    done = box.run("chat", *words.split(), stdin=f"{question}\n")
    assert without_times(done.stdout) == without_times(shown)
    described = rows("object | keys")
    for each in without_times(done.stdout):
        assert all(f"`{name}`" in described[each["type"]] for name in each if name != "type"), each


def test_the_page_shows_every_kind_of_object() -> None:
    shown = {json.loads(line)["type"] for _, _, block in EXAMPLES for line in block.splitlines()}
    assert shown == rows("object | keys").keys() == {"accepted", "delta", "done", "error"}


def test_the_page_has_every_flag_and_no_other() -> None:
    described = rows("flag | what it does")
    assert set(described) == {f"{flag} {takes}".strip() for flag, (takes, _) in FLAGS.items() if flag != HELP}
    assert set(re.findall(r"`([a-z_]+)`", described["--set name=value"])) == set(NAMES)


def test_every_option_of_a_request_can_be_set() -> None:
    # A conversation is what stdin is for, an adapter has its own flag, and the ids of tokens nobody reads.
    assert set(NAMES) == Submission([]).to_body().keys() - {"messages", "adapter", "wants_ids"}


def test_the_page_has_every_code() -> None:
    told = {name: int(number) for name, number in re.findall(r"`([a-z_]+)` \((\d)\)", PAGE)}
    assert told == {name: number for number, name in outputs.CODES.items()}
    assert rows("exit code | why").keys() == {"0", *map(str, outputs.CODES)}
