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

from sparsight.errors import Interrupted, SparsightError

SETTINGS = "settings.json"


@contextlib.contextmanager
def unfinished(out: Path, settings: Mapping[str, Any], resume: bool) -> Iterator[Path]:
    """Give the folder to keep intermediate results in; it is deleted once the block ends without an error.

    Ctrl-C leaves it in place and raises `Interrupted` with a line about how to go on; any other error deletes it, unless
    the disk is full. A process that is killed leaves it too.

    **Raises** `SparsightError` if `resume` finds no such folder, or one of other work.
    """
    folder = out.with_name(out.name + ".unfinished")
    wanted = json.loads(json.dumps(settings, default=str))
    if resume:
        _check(folder, wanted)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            (folder / SETTINGS).write_text(json.dumps(wanted, indent=1))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise SparsightError(f"{folder}: could not be written ({error}); nothing was left behind") from error
    try:
        yield folder
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"interrupted; what was done is in {folder}: the same command with --resume goes on from there"
        ) from stop
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
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
