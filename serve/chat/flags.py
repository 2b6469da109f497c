"""The flags of `chat` and `infer`, beside their NAME=value words. Standard library only, until there is a `--set`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.chat.phrases import hint, say
from serve.errors import UserError

COMMANDS = ("chat", "infer")
HELP = "--help"
# What each takes, and what it is for.
FLAGS = {
    "--json": ("", "answer with JSON objects, one a line (docs/pipes.md)"),
    "--system": ("TEXT", "what the model reads before the conversation"),
    "--adapter": ("NAME", "who answers; the same as ADAPTER=NAME"),
    "--set": ("name=value", "how the answer is sampled; may be given several times:"),
    "--file": ("PATH", "a text that goes in front of the question; may be given several times"),
    HELP: ("", "show this"),
}
EXAMPLES = {
    "--json": "--json",
    "--system": '--system "Answer in one sentence."',
    "--adapter": "--adapter base",
    "--set": "--set temperature=0.7",
    "--file": "--file notes.txt",
}


@dataclass(frozen=True)
class Flags:
    """What the flags ask for, and the `words` that are left; an adapter that was named is one of them."""

    words: tuple[str, ...]
    system: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    is_json: bool = False


def is_json(args: Sequence[str]) -> bool:
    """Whether this command line, good or bad, asks for JSON: what is wrong with it is told in JSON then, too."""
    return len(args) > 1 and args[0] in COMMANDS and "--json" in args[1:]


def split(words: Iterable[str]) -> Flags:
    """Tell flags and words apart, in whatever order they come; raises `UserError`."""
    given: dict[str, list[str]] = {flag: [] for flag in FLAGS}
    others: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            others.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in FLAGS:
            raise UserError(say("unknown_flag", flag=flag, hint=hint(flag, FLAGS), help=HELP))
        takes = FLAGS[flag][0]
        if takes and not equals:
            # What looks like the next flag is one: the value was forgotten.
            if not left or left[0].startswith("--"):
                raise UserError(say("flag_needs", flag=flag, what=takes, example=EXAMPLES[flag]))
            value = left.pop(0)
        elif equals and not takes:
            raise UserError(say("flag_takes_nothing", word=word, flag=flag))
        given[flag].append(value)
        if flag == "--adapter":
            others.append(f"ADAPTER={value}")
    for flag in ("--system", "--set"):
        for value in given[flag]:
            if not is_text(value):
                raise UserError(say("flag_not_utf8", flag=flag, example=EXAMPLES[flag]))
    system = "".join(given["--system"][-1:])
    return Flags(tuple(others), system, _sampling(given["--set"]), tuple(given["--file"]), bool(given["--json"]))


def is_text(value: str) -> bool:
    """Whether a message can carry it: bytes that are no UTF-8 arrive as lone surrogates."""
    return value.encode("utf-8", "replace").decode() == value


def _sampling(words: list[str]) -> dict[str, Any]:
    sampling: dict[str, Any] = {}
    if words:
        # It needs what `make setup` installs, and make itself never says --set.
        from serve.chat.sampling import change

        for word in words:
            sampling = change(sampling, word)
    return sampling


def help_text(command: str, names: Iterable[str]) -> str:
    """What `python -m serve chat --help` prints; `names` are the NAME=value words of the command."""
    from serve.chat.sampling import NAMES

    rows = {flag: (f"{flag} {takes}", meaning) for flag, (takes, meaning) in FLAGS.items()}
    rows["--set"] = (rows["--set"][0], f"{rows['--set'][1]}\n{'':21}{', '.join(NAMES)}")
    return "\n".join(
        [
            f"python -m serve {command} [NAME=value ...] [flags]",
            "",
            "On a terminal: a conversation. Through a pipe: one question on stdin, its answer on stdout.",
            "",
            *(f"  {usage:<19}{meaning}" for usage, meaning in rows.values()),
            "",
            f"NAME is one of {', '.join(names)}; README.md says what they mean.",
            "",
            "    python -m serve chat START=yes RUN=smollm2-135m-lora",
            '    echo "What does this do?" | python -m serve chat --file main.py --set max_tokens=200 --json',
            "",
            "Exit codes: 0 done, 2 usage, 3 no daemon, 4 context exceeded, 5 cancelled or deadline, 6 engine.",
        ]
    )
