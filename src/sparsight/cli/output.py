"""Print facts as tables or as JSON, and check output files before the work."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsight.cli.flags import flag
from sparsight.errors import SparsightError


def check_files(files: Mapping[str, str | None], data: str | None) -> None:
    """Refuse, by a `SparsightError`, files that cannot be written, that are equal, or that hold the data; none is left."""
    taken: dict[Path, str] = {}
    sources = (Path(data), Path(data, "metadata.jsonl")) if data else ()
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


def check_eval(values: Mapping[str, Any]) -> None:
    """Refuse, by a `SparsightError`, the files that `eval` could not write."""
    check_files({flag(name): values[name] for name in ("json_file", "predictions")}, values["data"])


def write_eval(result: Any, values: Mapping[str, Any]) -> None:
    """Write the files of `eval`. **Raises** `SparsightError` for one that cannot be written."""
    if path := values["predictions"]:
        with writing("--predictions", path):
            result.write_predictions(path)
    if path := values["json_file"]:
        with writing("--json-file", path):
            Path(path).write_text(result.to_json(), encoding="utf-8")


@contextlib.contextmanager
def writing(option: str, path: str) -> Iterator[None]:
    """Turn errors of writing inside the block into a `SparsightError` that names the option."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # a loop of links is the latter
        reason = getattr(error, "strerror", None) or error
        raise SparsightError(
            f"{option}: {path} cannot be written ({reason}); give a file in a folder that exists"
        ) from error


def show(facts: Any, as_json: bool, *parts: Any) -> None:
    """Print facts as JSON, or else the parts; only the main process prints."""
    if launched_rank():
        return
    if as_json:
        print(json.dumps(facts, indent=1, default=lambda record: record.__dict__))
        return
    from rich.console import Console

    # what is printed holds names of folders, which may look like markup
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    for part in parts:
        console.print(part)


def launched_rank() -> int:
    """This process's rank under a launcher; 0 without one, and then torch is not imported."""
    if "WORLD_SIZE" not in os.environ:
        return 0
    from sparsight import distributed

    return distributed.launched_rank()
