"""Memory that was needed once for a large message goes back to the system (glibc)."""

import ctypes

# malloc.h
_M_MMAP_THRESHOLD = -3
LARGE_BYTES = 128 * 2**10


def return_large_buffers() -> None:
    """From now on a buffer of `LARGE_BYTES` or more is given back when it is freed.

    By itself glibc raises that limit to the largest buffer it has ever seen, and keeps the holes that such buffers leave.
    """
    libc = ctypes.CDLL(None)
    # Other C libraries have no such habit, and no such function.
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
