"""What the box has, found without importing torch."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hardware:
    """`num_gpus` visible GPUs (0 = train on the processor), `num_cores` usable cores."""

    num_gpus: int
    num_cores: int
    has_bf16: bool


def detect() -> Hardware:
    """Ask nvidia-smi, and /proc/cpuinfo where there is no GPU."""
    cores = len(os.sched_getaffinity(0))
    capabilities = _gpu_capabilities()
    if capabilities:
        return Hardware(len(capabilities), cores, has_bf16=min(capabilities) >= 8.0)
    return Hardware(0, cores, has_bf16=_processor_has_bf16())


def _gpu_capabilities() -> list[float]:
    """The compute capability of each visible GPU; bf16 needs 8.0 (Ampere)."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        found = [float(line) for line in answer.stdout.split()]
    except (subprocess.SubprocessError, ValueError):
        return []
    return visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(found: list[float], devices: str | None) -> list[float]:
    """Those of `found` that CUDA_VISIBLE_DEVICES leaves visible; as in CUDA, the first invalid index ends the list."""
    if devices is None:
        return found
    left: list[float] = []
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
