"""A process that must not outlive its parent: the kernel ends it, also when the parent is killed outright."""

import ctypes
import os
import signal
import sys

PARENT = "AFINAR_PARENT"
_PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """The environment for a child that calls `follow_parent`."""
    return {**os.environ, PARENT: str(os.getpid())}


def follow_parent(end_with: signal.Signals) -> None:
    """If this process was started with `child_environment`, have it sent that signal when its parent ends (Linux)."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, end_with.value)
    if os.getppid() != int(parent):
        # The parent was gone before the kernel knew of our wish.
        os.kill(os.getpid(), end_with)
