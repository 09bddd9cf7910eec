"""Where long work keeps what it has done until its output is complete: the folder `OUT.unfinished` beside `OUT`.

It holds the settings of the work, so that `--resume` goes on with the same work and no other.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsight.errors import Interrupted, SparsightError

SETTINGS = "settings.json"


@contextlib.contextmanager
def parents(path: Path) -> Iterator[None]:
    """Make the folders that lead to `path`; on an error those that were made, and are empty, are gone again."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def unfinished(out: Path, settings: Mapping[str, Any], resume: bool) -> Iterator[Path]:
    """Give the folder to keep intermediate results in; it is deleted once the block ends without an error.

    Ctrl-C leaves it in place and raises `Interrupted` with a line about how to go on, and a process that is killed leaves
    it too; any error deletes it.

    **Raises** `SparsightError` if `resume` finds no such folder, or one of other work.
    """
    folder = out.with_name(out.name + ".unfinished")
    wanted = json.loads(json.dumps(settings, default=str))
    if resume:
        _check(folder, wanted)
    with parents(folder):
        try:
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                (folder / SETTINGS).write_text(json.dumps(wanted, indent=1))
            yield folder
        except KeyboardInterrupt as stop:
            raise Interrupted(
                f"interrupted; what was done is in {folder}: the same command with --resume goes on from there"
            ) from stop
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError | SafetensorError):  # safetensors wraps a full disk into an error of its own
                raise SparsightError(f"{folder}: could not be written ({error}); nothing was left behind") from error
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _check(folder: Path, wanted: Mapping[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.is_file():
        raise SparsightError(f"--resume: there is no interrupted work in {folder}; leave --resume out to start")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise SparsightError(f"--resume: {path} is damaged; leave --resume out to start over") from error
    for key in {**found, **wanted}:
        if found.get(key) != wanted.get(key):
            raise SparsightError(
                f"--resume: the interrupted work had {key}={found.get(key)!r}, this command has {wanted.get(key)!r}; "
                "use the same settings, or leave --resume out to start over"
            )
