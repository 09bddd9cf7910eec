"""What the commands share: facts as tables or as JSON, and files that are checked before the work."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError


def check_files(files: Mapping[str, str | None], data: str) -> None:
    """Refuse files that cannot be written, that are one and the same, or that hold the data; none is left or changed."""
    taken: dict[Path, str] = {}
    sources = (Path(data), Path(data, "metadata.jsonl"))
    for option, path in files.items():
        if not path:
            continue
        with writing(option, path):
            target = Path(path).resolve()
            if not target.is_fifo():  # opening one would wait for its reader
                new = not target.exists()
                with target.open("ab") as file:
                    os.write(file.fileno(), b"")  # a device that is full refuses even nothing
                if new:
                    target.unlink()
            if any(source.exists() and target.exists() and target.samefile(source) for source in sources):
                raise SparsightError(f"{option}: {path} holds the samples of --data; give another file")
            if other := taken.get(target):
                raise SparsightError(f"{option}: {path} is the file of {other}, too; give each a file of its own")
            taken[target] = option


@contextlib.contextmanager
def writing(option: str, path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # a loop of links is the latter
        reason = getattr(error, "strerror", None) or error
        raise SparsightError(
            f"{option}: {path} cannot be written ({reason}); give a file in a folder that exists"
        ) from error


def show(facts: Any, as_json: bool, *parts: Any) -> None:
    if place():
        return
    if as_json:
        print(json.dumps(facts, indent=1, default=lambda record: record.__dict__))
        return
    from rich.console import Console

    # what is printed holds names of folders, which may look like markup
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    for part in parts:
        console.print(part)


def place() -> int:
    """This process's place among those a launcher started; one process does not pay for the import of torch."""
    if "WORLD_SIZE" not in os.environ:
        return 0
    from sparsight import processes

    return processes.place()
