"""How much memory this process has held, as the system says it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch


def peak_memory(device: str | torch.device = "cpu") -> int | None:
    """Bytes that this process has held at most until now: on the GPU where that is the device, else of main memory.

    None where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":  # getrusage there begins with what the parent held
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return 1024 * int(found[1]) if found else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
