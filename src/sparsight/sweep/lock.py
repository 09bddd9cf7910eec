"""One sweep at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sparsight.errors import NotWritten, SparsightError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder if need be and hold it; the system lets go of it when the process ends, however it ends.

    An empty folder that was made here is gone again after an error. **Raises** `SparsightError` where another process
    works in it, `NotWritten` where it cannot be written to.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise SparsightError(f"{folder}: another process works in it; wait for its end, or give another folder") from None
    except OSError as error:
        raise NotWritten(f"{folder}: cannot be written to ({error.strerror}); give another folder") from error
    try:
        yield
    finally:
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
