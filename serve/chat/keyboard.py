"""The keyboard while the client runs: Ctrl-C reaches only the client, and keys typed during an answer are kept."""

import asyncio
import contextlib
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def own_keyboard(on_interrupt: Callable[[], None], *, is_drawn: bool) -> Iterator[None]:
    """Ctrl-C outside the prompt calls `on_interrupt`, never ends the program; keys typed wait for the next prompt.

    `is_drawn`: the prompt is drawn here, key by key; otherwise the terminal keeps its own line.
    """
    loop = asyncio.get_running_loop()
    before = termios.tcgetattr(sys.stdin)
    ours = termios.tcgetattr(sys.stdin)
    if is_drawn:
        # Without line mode a Ctrl-D that comes too early is kept like any other key.
        ours[0] &= ~termios.ICRNL
        ours[3] &= ~(termios.ECHO | termios.ICANON)
    # Ctrl-Z would stop this process alone and leave `make`, and so the shell, waiting.
    ours[6][termios.VSUSP] = b"\0"
    loop.add_signal_handler(signal.SIGINT, on_interrupt)
    with _foreground():
        termios.tcsetattr(sys.stdin, termios.TCSANOW, ours)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
            loop.remove_signal_handler(signal.SIGINT)


@contextlib.contextmanager
def _foreground() -> Iterator[None]:
    """A process group of our own: the terminal sends Ctrl-C to a whole group, and `make` would end with it."""
    group = os.getpgrp()
    if group == os.getpid() or _group_in_front() != group:
        yield
        return
    # Giving the terminal back happens from the background, where this signal would stop us.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.tcsetpgrp(sys.stdin.fileno(), os.getpgrp())
    try:
        yield
    finally:
        # `make` may have been killed meanwhile.
        with contextlib.suppress(OSError):
            os.tcsetpgrp(sys.stdin.fileno(), group)


def _group_in_front() -> int:
    """The group that the terminal sends signals to; 0 if it is not the terminal of this session."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno())
    except OSError:
        return 0
