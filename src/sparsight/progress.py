"""The progress of long work, a function `progress(note, done, total)`."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def prefix(progress: Progress | None, stage: str) -> Progress | None:
    """The same progress with the name of a stage in front of every note."""
    if progress is None:
        return None
    return lambda note, done, total: progress(f"{stage}: {note}", done, total)
