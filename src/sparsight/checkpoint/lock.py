"""The lock on an output folder: of two processes that write to the same one, the second is refused before it computes.

The lock is a file beside the folder, `.OUT.lock`, or inside it where OUT is a mount point or the folder above cannot be
written to. It holds the number and the host of the process that works, and the system locks it as well: that lock ends with
the process, after a kill, too. So a file that a dead process of this host has left is taken over. A process of another host
cannot be asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from sparsight.errors import NotWritten, SparsightError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

INSIDE = ".lock"  # the name of a lock inside its folder


def lock_file(out: str | Path) -> Path:
    """The file that locks an output folder, which need not be there."""
    place = Path(out).resolve()
    inside = place.is_dir() and (os.path.ismount(place) or not os.access(place.parent, os.W_OK))
    return place / INSIDE if inside else place.with_name(f".{place.name}.lock")


@contextlib.contextmanager
def locked(out: str | Path) -> Iterator[None]:
    """Hold the lock on an output folder inside the block; of several processes of a launcher only the main one does.

    Folders that were made for the lock, and are empty at the end, are removed. **Raises** `SparsightError`, which names the
    process, where another one holds the lock; `NotWritten` where no lock can be written.
    """
    from sparsight.distributed import launched_rank  # torch comes with it

    if launched_rank():
        yield
        return
    descriptor, missing = None, []
    try:
        try:
            file = lock_file(out)
            missing = [folder for folder in file.parents if not folder.exists()]
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _take(file, out)
        except (OSError, RuntimeError) as error:  # a loop of links is the latter
            raise NotWritten(f"{out}: cannot be written to ({first_line(error)}); give another folder") from error
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if _is_at(descriptor, file):
                    file.unlink()
            os.close(descriptor)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(file: Path, out: str | Path) -> int:
    """Open the file, lock it and write this process into it; return its descriptor."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _lock(descriptor)
            if free and not _is_at(descriptor, file):  # its holder has ended and deleted it just now
                os.close(descriptor)
                continue
            here, holder = socket.gethostname(), _holder(descriptor)
            elsewhere = holder is not None and holder[1] != here
            works = free is False or (free is None and holder is not None and psutil.pid_exists(holder[0]))
            if works or elsewhere:
                who = "another process" if holder is None else f"process {holder[0]} on {holder[1]}"
                line = f"{out}: {who} is writing to it; wait for its end, or give another folder"
                raise SparsightError(line + f"; if that job is dead, delete {file}" if elsewhere else line)
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": here}).encode() + b"\n")
            return descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _lock(descriptor: int) -> bool | None:
    """Whether the system gives this process the lock; None where it has none for this file system."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> tuple[int, str] | None:
    """The process and the host in a lock file; None where there is nothing legible."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        facts = json.loads(os.read(descriptor, 4096))
        return int(facts["pid"]), str(facts["host"])
    except (ValueError, KeyError, TypeError):
        return None
