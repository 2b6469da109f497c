"""The text of a file, as it stands in front of a question."""

import os
import re
import stat
from pathlib import Path

from serve.chat.printable import printable
from serve.errors import UserError

MAX_BYTES = 2**20


def path_of(name: str) -> Path:
    """The path that was typed; `~somebody` who is not there is a name like any other, as in a shell. Raises `UserError`."""
    if "\0" in name:
        raise UserError(f"{name}: no path has a NUL in it; try another one")
    return Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser refuses somebody who is not there)


def read_file(name: str, *, is_regular: bool = False) -> str:
    """The file in a code fence with its name; raises `UserError` for what is no text, or too long to be one.

    `is_regular`: refuse anything else, such as a pipe that nobody may ever write to.
    """
    path = path_of(name)
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | (os.O_NONBLOCK if is_regular else 0)), "rb") as file:
            if is_regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{name}: not a regular file; try the path of a text file")
            # Not by its size: a pipe and /dev/zero have none.
            data = file.read(MAX_BYTES + 1)
    except OSError as fault:
        raise UserError(f"{name}: {fault.strerror}; try the path of a text file") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{name}: larger than {MAX_BYTES // 2**20} MiB; try a part of it: head -c 100000 {name}")
    try:
        # Without the mark that some editors put first.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise UserError(f"{name}: not UTF-8 (byte {fault.start}); try: iconv -t utf-8") from None
    # Longer than any in the file, so that the file cannot end it; a backtick in the first line would make it no fence.
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in ["", *re.findall("`+", text)]))
    head = printable(path.name).replace("\n", "\\n").replace("`", "'")
    return f"{fence}{head}\n{text.removesuffix(chr(10))}\n{fence}"
