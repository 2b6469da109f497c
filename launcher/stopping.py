"""A run that is told to stop: SIGTERM, SIGINT or SIGUSR1 at any process, at any moment. Free of torch."""

import os
import signal
import threading
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """Set by the first signal; all processes then agree to stop at the next step, with a checkpoint.

    The second signal ends this process at once, with the exit code that shells give a signal. A thread listens, because
    Python runs its handlers in the main thread only, and that may be waiting in a collective operation for a process that
    has gone.
    """

    def __init__(self) -> None:
        self.is_set = False
        # A process that had nothing to lose may be interrupted again while it leaves.
        self.is_leaving = False

    def install(self) -> "Stop":
        """Listen from now on; must be called in the main thread."""
        listen, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _leave_it_to_the_thread)
        threading.Thread(target=self._listen, args=(listen,), daemon=True, name="signals").start()
        return self

    def check(self) -> None:
        """Leave where nothing has begun yet. Raises `KeyboardInterrupt` if a signal has come."""
        if self.is_set:
            raise KeyboardInterrupt

    def _listen(self, pipe: int) -> None:
        while received := os.read(pipe, 1):
            if received[0] not in SIGNALS or self.is_leaving:
                continue
            if self.is_set:
                os._exit(128 + received[0])
            self.is_set = True


def _leave_it_to_the_thread(*_: Any) -> None:
    """The interpreter has already told the thread; a handler must stand here for it to do so."""
