"""The text of a file, as it stands in front of a question."""

import os
import re
import stat
from pathlib import Path

from serve.chat.phrases import say
from serve.chat.printable import printable
from serve.errors import UserError

MAX_BYTES = 2**20


def path_of(name: str) -> Path:
    """The path that was typed; `~somebody` who is not there is a name like any other, as in a shell. Raises `UserError`."""
    if "\0" in name:
        raise UserError(say("nul_in_path", path=name))
    return Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser refuses somebody who is not there)


def read_file(name: str, *, is_regular: bool = False) -> str:
    """The file in a code fence with its name; raises `UserError` for what is no text, or too long to be one.

    `is_regular`: refuse anything else, such as a pipe that nobody may ever write to.
    """
    path = path_of(name)
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | (os.O_NONBLOCK if is_regular else 0)), "rb") as file:
            if is_regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(say("no_regular_text", path=name))
            # Not by its size: a pipe and /dev/zero have none.
            data = file.read(MAX_BYTES + 1)
    except OSError as fault:
        raise UserError(say("text_fault", path=name, fault=fault.strerror)) from None
    if len(data) > MAX_BYTES:
        raise UserError(say("text_too_large", path=name, most=MAX_BYTES // 2**20))
    try:
        # Without the mark that some editors put first.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise UserError(say("text_not_utf8", path=name, byte=fault.start)) from None
    # Longer than any in the file, so that the file cannot end it; a backtick in the first line would make it no fence.
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in ["", *re.findall("`+", text)]))
    head = printable(path.name).replace("\n", "\\n").replace("`", "'")
    return f"{fence}{head}\n{text.removesuffix(chr(10))}\n{fence}"
