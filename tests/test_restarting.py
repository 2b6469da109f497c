"""A daemon that holds a run merged is started again with the base beside it, where a comparison asks for it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from serve import starter
from tests.serve_fixtures import PATIENCE, Box, RawClient, Screen, box, wait_until

__all__ = ["box"]
INTERRUPT, LEAVE = "\x03", "\x04"
WEIGHTS = "adapter/adapter_model.safetensors"
MERGED = "tuned is merged into its base, so the base is not beside it. "
QUESTION = [
    f"{MERGED}The daemon can be started again with both: that takes some seconds, and answers come a little slower then.",
    "  r      start it again with both",
    "  Enter  leave it",
]
HINT = [
    f"error: {MERGED}Try /quit, make stop RUN=runs/tuned, make chat RUN=runs/tuned HOLD=adapters, and there /resume",
]
SETTINGS = ("DTYPE=fp32", "serve.context=256")
# A daemon imports torch and peft and loads a model, beside whatever else the machine does.
LOADING = 3 * PATIENCE
# A wide screen: rows that are wrapped are not the same words.
WIDE = (400, 50)


# How a daemon was started.


def test_a_daemon_that_was_started_in_the_background_can_be_started_so_again(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("HOLD=echo", "RUN=runs/a b", "DTYPE=fp32", "serve.slots=3", "serve.context=300")
    with Screen(box, "chat", "START=yes", *words) as screen:
        screen.expect("\n>")
        record = box.record("a b")
        origin = starter.origin(box.runtime, record)
        assert origin is not None and not origin.is_child
        assert origin.holding("adapters").arguments.words() == [
            # It was started in another folder than this.
            f"RUN={box.work}/runs/a b", "HOLD=adapters", "DTYPE=fp32", "NGPU=1", "serve.slots=3", "serve.context=300",
        ]  # fmt: skip
        monkeypatch.chdir(box.work)
        origin = starter.origin(box.runtime, record)
        assert origin is not None and origin.arguments.run == "runs/a b"


def test_a_daemon_that_somebody_else_looks_after_is_left_alone(box: Box) -> None:
    box.daemon()
    assert starter.origin(box.runtime, box.record()) is None
    with Screen(box, "infer", "HOLD=echo", "RUN=other") as screen:
        screen.expect("\n>")
        # It ends with that terminal.
        assert starter.origin(box.runtime, box.record("other")) is None


# What a person sees; the daemon is a real one, with a tiny model.


@pytest.fixture
def run(trained_run: Callable[..., Path], box: Box) -> Path:
    """A run of the box's own, as some tests break it."""
    return shutil.copytree(trained_run("lora", "llama"), box.work / "runs" / "tuned")


class Chat(Screen):
    """A wide screen on which a tuned run has answered something. A tiny model says anything: its words do not matter."""

    def __init__(self, box: Box, *words: str, **extra: str) -> None:
        super().__init__(box, *words, "RUN=tuned", "--set", "max_tokens=4", size=WIDE, **extra)

    def __enter__(self) -> "Chat":
        self.expect("\n>", LOADING)
        self.type("hello\r")
        self.expect("[max_tokens]\n>")
        return self

    def compare(self, rows: list[str], line: str = "/compare") -> None:
        """Enter it, and see exactly these rows."""
        assert self.enter(line, rows[-1]) == [f"> {line}", *rows]

    def enter(self, line: str, last: str) -> list[str]:
        """The rows that come with a line, once one that ends with `last` has come."""
        before = len(self.said)
        self.type(f"{line}\r")
        wait_until(lambda: self.read(0.05) and any(row.endswith(last) for row in self.said[before + 1 :]), LOADING)
        return self.said[before:]

    def agree(self) -> None:
        """Have it started again, and see both of them answer."""
        words = r"\n.*\[max_tokens\]\n"
        assert re.fullmatch(
            rf"> r\nConnected: runs/tuned: \S+ \+ tuned \(adapters, fp32\), 256 tokens; also here: base\n"
            rf"── base{words}── tuned{words}The answer of tuned is kept\.",
            "\n".join(self.enter("r", "is kept.")),
        )


@pytest.mark.slow
def test_a_comparison_starts_a_merged_daemon_again_with_both(box: Box, run: Path) -> None:
    with Chat(box, "chat", "START=yes", "HOLD=merged", *SETTINGS) as chat:
        merged = box.record("tuned")
        # It would not hold this one either.
        chat.compare(HINT, "/compare base another")
        chat.compare(QUESTION)
        assert chat.enter("", "Not asked.") == [">", "Not asked."]
        with RawClient(merged):
            others = "1 other client is connected, and would be cut off."
            chat.compare([QUESTION[0], others, *QUESTION[1:]], "/compare tuned base")
            chat.enter("n", "Not asked.")
        assert merged.is_alive
    # One that finds it, and did not start it.
    with Chat(box, "chat", "START=yes", "HOLD=merged", *SETTINGS) as chat:
        assert box.record("tuned") == merged
        chat.enter("/compare", "leave it")
        chat.agree()
        assert not merged.is_alive
        assert "; 1 exchange in" in chat.ask("/status", "slots")[-1]
        # From now on it is that one that is started where there is none.
        assert box.run("stop", "RUN=tuned").returncode == 0
        assert any("(adapters, fp32), 256 tokens" in row for row in chat.enter("/compare base tuned", "tuned is kept."))
        chat.type(LEAVE)
        assert chat.wait() == 0
    # As `make chat` leaves one.
    assert box.record("tuned").is_alive


@pytest.mark.slow
def test_the_daemon_of_infer_ends_with_it_also_when_it_was_started_again(box: Box, run: Path) -> None:
    with Chat(box, "infer", *SETTINGS) as chat:
        chat.compare(QUESTION)
        chat.agree()
        both = box.record("tuned")
        chat.type(LEAVE)
        assert chat.wait() == 0
    assert not both.is_alive and box.left() == set()


@pytest.mark.slow
def test_a_daemon_that_does_not_start_again_ends_no_conversation(box: Box, run: Path) -> None:
    with Chat(box, "chat", "START=yes", *SETTINGS) as chat:
        chat.compare(QUESTION)
        (run / WEIGHTS).rename(run / "away")
        assert re.fullmatch(
            r"> r\nerror: the daemon does not start with both: .*tuned.*\. "
            r"The conversation is kept, and the next question starts it as it was",
            "\n".join(chat.enter("r", "starts it as it was")),
        )
        (run / "away").rename(run / WEIGHTS)
        assert "(merged, fp32), 256 tokens" in chat.enter("and?", "[max_tokens]")[1]
        assert "; 2 exchanges in" in chat.ask("/status", "slots")[-1]


@pytest.mark.slow
def test_ctrl_c_while_it_is_started_again_leaves_the_comparison_at_the_prompt(box: Box, run: Path) -> None:
    with Chat(box, "chat", "START=yes", *SETTINGS) as chat:
        merged = box.record("tuned")
        chat.compare(QUESTION)
        chat.type("r\r")
        # Ending or starting it: whichever is seen first.
        chat.expect("ing the daemon")
        chat.type(INTERRUPT)
        chat.expect("> /compare\n")
        wait_until(lambda: not merged.is_alive)
        chat.type("\r")
        chat.expect("The answer of tuned is kept.\n>", LOADING)


@pytest.mark.slow
def test_who_may_start_no_daemon_or_cannot_draw_is_told_what_to_do(box: Box, run: Path) -> None:
    with Chat(box, "chat", "START=yes", *SETTINGS, NO_COLOR="1") as chat:
        chat.compare(HINT)
    with Chat(box, "chat") as chat:
        chat.compare(HINT)
