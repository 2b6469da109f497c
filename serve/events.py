"""What happened, one JSON object a line: `<name>.events.log` in the runtime directory. Never what anybody wrote."""

import json
import logging
import logging.handlers
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_BYTES = 4 * 2**20
NUM_OLDER = 2


def open_log(path: Path) -> Callable[..., None]:
    """`tell(event, **fields)` appends a line; a file that grows too long makes way for a new one."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=NUM_OLDER, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    # Not from the registry of loggers: what other libraries configure there is not for this file.
    logger = logging.Logger("events")
    logger.addHandler(handler)

    def tell(event: str, **fields: Any) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        logger.info(json.dumps({"time": stamp, "event": event, **fields}))

    return tell
