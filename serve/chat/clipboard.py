"""Text into the clipboard: by the program of the desktop, or through the terminal itself (OSC 52), which also works over ssh."""

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping

PROGRAMS = {"WAYLAND_DISPLAY": ["wl-copy"], "DISPLAY": ["xclip", "-selection", "clipboard"]}
SECONDS = 2.0


def by_program(text: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Copy with a program of the desktop; False if there is none that can."""
    for command in _commands(environment):
        try:
            subprocess.run(
                command,
                input=text.encode("utf-8", "replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return True
    return False


def by_terminal(text: str) -> None:
    """Ask the terminal; what it does is its own affair, and nobody is told."""
    # Encoded, so that nothing in the text can be an escape of its own.
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(text.encode('utf-8', 'replace')).decode()}\x07")
    sys.stdout.flush()


def _commands(environment: Mapping[str, str]) -> list[list[str]]:
    wanted = [command for name, command in PROGRAMS.items() if environment.get(name)]
    wanted += [["pbcopy"]] if sys.platform == "darwin" else []
    return [command for command in wanted if shutil.which(command[0])]
