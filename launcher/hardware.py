"""What the box has, found without importing torch; or what a box would have that was described in words."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

GIB = 2**30
Gpu = TypeVar("Gpu", float, tuple[float, int])


@dataclass(frozen=True)
class Hardware:
    """One machine: `num_gpus` visible GPUs (0 = train on the processor) of `gpu_bytes` each, `num_cores` usable cores.

    Memory in bytes, None where it is not known.
    """

    num_gpus: int
    num_cores: int
    has_bf16: bool
    gpu_bytes: int | None = None
    host_bytes: int | None = None


def detect() -> Hardware:
    """Ask nvidia-smi, and /proc/cpuinfo where there is no GPU."""
    cores = len(os.sched_getaffinity(0))
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if gpus := _gpus():
        has_bf16 = min(capability for capability, _ in gpus) >= 8.0
        return Hardware(len(gpus), cores, has_bf16, min(memory for _, memory in gpus), host)
    return Hardware(0, cores, _processor_has_bf16(), None, host)


def describe(words: str) -> Hardware:
    """A machine written as `4x24GB`: four GPUs of 24 GiB; or `24GB`, one of them. See `variables` for the check."""
    num_gpus, size = re.fullmatch(r"(?:(\d+)x)?(\d+)GB", words).groups()  # type: ignore[union-attr]
    count = int(num_gpus or 1)
    return Hardware(count, 8 * count, has_bf16=True, gpu_bytes=int(size) * GIB)


def _gpus() -> list[tuple[float, int]]:
    """(compute capability, bytes of memory) of each visible GPU; bf16 needs 8.0 (Ampere)."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        rows = [line.split(",") for line in answer.stdout.strip().splitlines()]
        found = [(float(capability), int(mebibytes) * 2**20) for capability, mebibytes in rows]
    except (subprocess.SubprocessError, ValueError):
        return []
    return visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(found: list[Gpu], devices: str | None) -> list[Gpu]:
    """Those of `found` that CUDA_VISIBLE_DEVICES leaves visible; as in CUDA, the first invalid index ends the list."""
    if devices is None:
        return found
    left: list[Gpu] = []
    for word in devices.split(","):
        if not word.strip():
            break
        if word.strip().lstrip("-").isdigit():
            if not 0 <= int(word) < len(found):
                break
            left.append(found[int(word)])
        else:
            left.append(min(found))  # named by UUID
    return left


def _processor_has_bf16() -> bool:
    """Whether bf16 is computed in hardware; emulated, it is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
