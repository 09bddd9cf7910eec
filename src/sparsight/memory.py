"""The peak memory of this process, as the system reports it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch


def peak_memory(device: str | torch.device = "cpu") -> int | None:
    """Return this process's peak memory in bytes: of the GPU if `device` is one, else main memory; None if unknown."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":  # getrusage counts the parent's memory there
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        return 1024 * int(peak[1]) if peak else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
