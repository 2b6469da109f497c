"""Import the libraries that take seconds (torch, transformers, PEFT and what they bring) in two thirds of the time."""

import contextlib
import gc
import os
from collections.abc import Iterator

# torch's own switch.
NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextlib.contextmanager
def heavy() -> Iterator[None]:
    """A block in which they are imported.

    PEFT imports bitsandbytes, which hands four functions to `torch.compile`, and that imports the whole compiler. They are for
    devices without kernels of their own, which GPUs and processors have, and compute the same when they are not compiled.

    The garbage collector would go through all new modules again and again and find nothing. What is imported stays, so later
    collections pass it over too.
    """
    given = os.environ.get(NO_COMPILER)
    os.environ[NO_COMPILER] = "1"
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if given is None:
            del os.environ[NO_COMPILER]
        else:
            os.environ[NO_COMPILER] = given
