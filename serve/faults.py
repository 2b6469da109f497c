"""An exception of an engine as the code and the line that a client is told."""

from serve.protocol import Code


def engine_code(fault: BaseException) -> Code:
    """E_OOM for an allocation that failed, E_ENGINE for the rest. torch's error is known by name: torch is not here."""
    is_memory = isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError"
    return Code.OOM if is_memory or "allocate memory" in str(fault) else Code.ENGINE


def first_line(fault: BaseException) -> str:
    """An exception as one line."""
    lines = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__
