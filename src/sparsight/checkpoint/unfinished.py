"""Intermediate results of long work until its output is complete: the folder `OUT.unfinished` beside `OUT`.

It holds the settings of the work, so that `resume` continues the same work and no other.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsight.errors import Interrupted, NotWritten, OutOfMemory, SparsightError, quote
from sparsight.files import read_json, write_json

SETTINGS = "settings.json"
SPACE = "weights"  # a folder of files whose space is taken before anything is done


@contextlib.contextmanager
def parents(path: Path) -> Iterator[None]:
    """Make the folders that lead to `path`; on an error inside the block the new ones are deleted if they are empty."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_unfinished(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse, by a `SparsightError`, to go on with work that is not there, and to begin anew where some is."""
    folder = out.with_name(out.name + ".unfinished")
    if resume and not (folder / SETTINGS).is_file():
        raise SparsightError(f"`resume`: there is no interrupted work in {folder}; leave `resume` out to start")
    if folder.exists() and not resume and not overwrite:
        raise SparsightError(f"{folder}: holds interrupted work; go on with `resume`, or start over with `overwrite`")


@contextlib.contextmanager
def unfinished(out: Path, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Yield the folder for intermediate results; it is deleted once the block ends without an error.

    Any error keeps the folder if it holds results, and says how to go on, which is by `resume` only where that can help;
    Ctrl-C always keeps it.

    **Raises** `SparsightError` if `resume` finds no such folder or one of other work, and if there is one without `resume`
    or `overwrite`; `Interrupted` for Ctrl-C; `NotWritten` for a full disk.
    """
    folder = out.with_name(out.name + ".unfinished")
    plain = json.loads(json.dumps(settings, default=str))
    check_unfinished(out, resume, overwrite)
    if resume:
        _check(folder, plain)
    goes_on = f"what was done is in {folder}: the same command with `resume` goes on from there"
    try:
        with parents(folder):
            try:
                if not resume:
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    write_json(folder / SETTINGS, plain)
                yield folder
            except BaseException as error:
                if not resume and not isinstance(error, KeyboardInterrupt) and not _anything_done(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted; {goes_on}") from stop
    except (OSError, SafetensorError, NotWritten) as error:  # safetensors wraps a full disk into an error of its own
        failed = error if isinstance(error, NotWritten) else NotWritten(f"{folder}: could not be written ({error})")
        failed.work = folder if _anything_done(folder) else None
        failed.advice = goes_on if failed.work else "nothing was left behind"
        raise failed from (error.__cause__ if failed is error else error)
    except SparsightError as error:
        if _anything_done(folder):
            error.work, error.retry = folder, error.retry or _of_a_file(error)
            error.advice = _advice(error, folder)
        raise
    except Exception as error:
        if _anything_done(folder):
            error.add_note(goes_on)
        raise


def _advice(error: SparsightError, folder: Path) -> str:
    """How to go on after an error that the same command would meet again."""
    if error.retry:
        then = "with these settings" if isinstance(error, OutOfMemory) else "once that is mended,"
        return f"what was done is in {folder}: {then} `resume` goes on from there"
    anew = f"start over with `overwrite`, which deletes {folder}"
    return f"{anew}; or with more memory `resume` goes on" if isinstance(error, OutOfMemory) else anew


def _of_a_file(error: BaseException | None) -> bool:
    """Whether a file that could not be read is the cause of an error, which may be mended."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None


def _anything_done(folder: Path) -> bool:
    return folder.is_dir() and any(
        path.name != SETTINGS and not (path.name == SPACE or _empty(path)) for path in folder.iterdir()
    )


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder without settings, or with others than these."""
    stored = read_json(folder / SETTINGS, "start over with `overwrite` in place of `resume`")
    for key in {**stored, **settings}:
        if stored.get(key) != settings.get(key):
            error = SparsightError(
                "`resume`: files of the model are not those that the interrupted work began with"
                if key == "files"
                else f"`resume`: the interrupted work had {key}={quote(stored.get(key))}, this command has "
                f"{quote(settings.get(key))}"
            )
            error.work = folder
            same = "put them back" if key == "files" else "use the same settings"
            error.advice = f"{same}, or start over with `overwrite` in place of `resume`"
            raise error
