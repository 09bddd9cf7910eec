"""The peak memory of this process, as the system reports it, and what to say when memory runs out."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from sparsight.errors import OutOfMemory, first_line

SAID = ("can't allocate memory", "cannot allocate memory", "not enough memory", "cuda out of memory", "error: out of memory",
        "alloc_failed")  # fmt: skip


AUTO = "auto"  # a device: the GPUs that there are, else the CPU


def main_device(device: str | torch.device) -> torch.device:
    """The device that inputs go to: of `AUTO` the first GPU, or the CPU where there is none."""
    if device == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def peak_memory(device: str | torch.device = "cpu") -> int | None:
    """Return this process's peak memory in bytes: of the GPU if `device` is one, else main memory; None if unknown."""
    if main_device(device).type == "cuda":
        return sum(int(torch.cuda.max_memory_allocated(each)) for each in _devices(device))
    if sys.platform == "linux":  # getrusage counts the parent's memory there
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        return 1024 * int(peak[1]) if peak else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that this process can still take: of the GPU if `device` is one, else of the machine or its control group."""
    if main_device(device).type == "cuda":
        return sum(int(torch.cuda.mem_get_info(each)[0]) for each in _devices(device))
    return min([psutil.virtual_memory().available, *_groups_free()])


def _devices(device: str | torch.device) -> list[torch.device]:
    """The GPUs that a device stands for."""
    if device != AUTO:
        return [torch.device(device)]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def _groups_free() -> Iterator[int]:
    """What the control groups of this process leave it, where there are some, as in a container; files do not count."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "":
                home, limit, used = root, "memory.max", "anon"
            elif "memory" in kinds.split(","):
                home, limit, used = root / "memory", "memory.limit_in_bytes", "rss"
            else:
                continue
            for group in (home / path.lstrip("/"), home):  # a container sees its own group as the root
                with contextlib.suppress(OSError, ValueError, KeyError):
                    facts = dict(row.split() for row in (group / "memory.stat").read_text(encoding="ascii").splitlines())
                    yield int((group / limit).read_text(encoding="ascii")) - int(facts[used])


def give_back_memory() -> None:
    """Return freed memory to the system, which glibc keeps between what lives; does nothing elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, of a GPU or of the machine: torch has no class of its own for the latter."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SAID)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextlib.contextmanager
def enough_memory(spec: Any) -> Iterator[None]:
    """Turn the error of memory that runs out inside the block into one line, with what to lower of the settings.

    **Raises** `OutOfMemory`.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice, retry = spec.less_memory
        short = OutOfMemory(f"out of memory ({first_line(error)}); {advice}")
        short.retry = retry
        raise short from error
