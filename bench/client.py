"""Cold start of the terminal client: seconds from the command to the prompt, on a real pseudo-terminal.

python -m bench.client      (a daemon with the echo engine is started for it)
"""

import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time

NUM_STARTS = 9
# Bold ">", as prompt_toolkit draws the prompt.
PROMPT = b"\x1b[0;1m>"


def start_to_prompt(env: dict[str, str]) -> float:
    """Start `python -m serve chat` on a new pseudo-terminal and wait until the prompt is drawn."""
    ours, theirs = pty.openpty()
    began = time.perf_counter()
    client = subprocess.Popen(
        [sys.executable, "-m", "serve", "chat"], stdin=theirs, stdout=theirs, stderr=theirs, env=env, close_fds=True,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while PROMPT not in seen:
        seen += os.read(ours, 4096)
    seconds = time.perf_counter() - began
    client.kill()
    client.wait()
    os.close(ours)
    return seconds


def main() -> None:
    """Print the median and the worst of several starts, and one JSON line."""
    with tempfile.TemporaryDirectory(prefix="af-") as folder:
        env = {
            **os.environ,
            "AFINAR_RUNTIME_DIR": folder,
            "HOME": folder,
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        daemon = subprocess.Popen(
            [sys.executable, "-m", "serve", "daemon", "HOLD=echo"], env=env, stdout=subprocess.PIPE, text=True
        )
        assert daemon.stdout
        daemon.stdout.readline()
        seconds = [start_to_prompt(env) for _ in range(NUM_STARTS)]
        daemon.terminate()
        daemon.wait()
    result = {"median_s": round(statistics.median(seconds), 3), "worst_s": round(max(seconds), 3), "starts": NUM_STARTS}
    print(f"cold start to prompt: median {result['median_s']} s, worst {result['worst_s']} s of {NUM_STARTS}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
