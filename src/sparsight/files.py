"""Write files as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` once the block ends without an error.

    On an error what was written is deleted, and `path` is as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    with replace_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, facts: Any, indent: int | None = 1) -> None:
    """Write plain values as a JSON file, as a whole or not at all; other values are written as their `str`."""
    write_text(path, json.dumps(facts, indent=indent, default=str, ensure_ascii=False) + "\n")
