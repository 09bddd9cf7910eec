"""Write files as a whole or not at all, with the modes that the user's umask gives; what a folder to write to must be."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError, first_line


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` once the block ends without an error.

    On an error what was written is deleted, and `path` is as it was. The mode is that of a file which `open` makes,
    whatever the block writes with.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        mode = _make(beside)
        yield beside
        _set_mode(beside, mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path, then: str, kind: type = dict) -> Any:
    """Read a JSON file that holds a `kind`.

    **Raises** `SparsightError` for a file that cannot be read, is no JSON or holds something else; `then` says what to do.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SparsightError(f"{path}: cannot be read ({first_line(error)}); {then}") from error
    except (ValueError, RecursionError) as error:
        raise SparsightError(f"{path}: is damaged ({first_line(error)}); {then}") from error
    if not isinstance(facts, kind):
        raise SparsightError(f"{path}: is damaged (holds a {type(facts).__name__}, not a {kind.__name__}); {then}")
    return facts


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    with replace_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, facts: Any, indent: int | None = 1) -> None:
    """Write plain values as a JSON file, as a whole or not at all; other values are written as their `str`."""
    write_text(path, json.dumps(facts, indent=indent, default=str, ensure_ascii=False) + "\n")


def make_beside(path: Path) -> Path:
    """Make an empty folder beside `path`, with a name that is not taken and the mode that `mkdir` gives."""
    while True:
        beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        with contextlib.suppress(FileExistsError):
            beside.mkdir()
            return beside


def set_modes(folder: Path) -> None:
    """Give every file in `folder` the mode of one which `open` makes: safetensors makes files for their owner alone."""
    probe = folder / f".{secrets.token_hex(4)}"
    try:
        mode = _make(probe)
    finally:
        probe.unlink(missing_ok=True)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _set_mode(path, mode)


def _make(path: Path) -> int:
    """Make an empty file and return its mode; asking for the umask itself would change it for a moment, in all threads."""
    path.touch()
    return path.stat().st_mode


def _set_mode(path: Path, mode: int) -> None:
    if path.stat().st_mode != mode:
        path.chmod(mode)


def without_home(value: Any) -> Any:
    """Plain values with `~` for the user's home folder in every path: a folder that is published does not name the user."""
    home = _home()
    return _each(value, lambda text: "~" + text.removeprefix(home) if home and text.startswith(home + os.sep) else text)


def with_home(value: Any) -> Any:
    """Plain values with the home folder of this user for `~`."""
    home = _home()
    return _each(value, lambda text: home + text[1:] if home and text.startswith("~" + os.sep) else text)


def _home() -> str:
    """The user's home folder; "" where there is none, or where it is that of the whole machine."""
    try:
        return str(Path.home()).rstrip(os.sep)
    except RuntimeError:
        return ""


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """Plain values with every text among them changed; keys stay."""
    if isinstance(value, Mapping):
        return {key: _each(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_each(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def is_there(path: str | Path) -> bool:
    """Whether there is a file or folder; a name that is too long, and one that may not be looked at, is that of none."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def check_output(folder: str | Path, overwrite: bool = False, inputs: Sequence[str | Path | None] = ()) -> Path:
    """The output folder, where a link leads to; touches nothing.

    **Raises** `SparsightError` for one that would lose something, as one of the `inputs`.
    """
    out = Path(folder)
    try:
        out = Path(os.path.realpath(out)) if out.is_symlink() else out
        if out.is_symlink():  # a loop, of which `resolve` says nothing from Python 3.13 on
            raise OSError(errno.ELOOP, "a loop of links")
        if out.is_file():
            raise SparsightError(f"{out}: is a file; give a folder to write to")
        blocking = next((parent for parent in out.parents if parent.is_file()), None)
        if blocking:
            raise SparsightError(f"{out}: {blocking} is a file; give a folder to write to")
        if os.path.ismount(out):
            raise SparsightError(f"{out}: is a mount point and cannot be replaced; give a folder inside it")
        for given in inputs:
            if given is not None and is_there(given) and Path(given).resolve().is_relative_to(out.resolve()):
                raise SparsightError(f"{out}: holds what is read ({given}); give another folder to write to")
        if out.is_dir() and any(out.iterdir()):
            if not overwrite:
                raise SparsightError(f"{out}: exists and is not empty; choose another folder, or add `overwrite`")
            if not (out / "config.json").is_file():
                raise SparsightError(f"{out}: is not a model folder, so `overwrite` does not delete it; choose another")
    except (OSError, RuntimeError) as error:  # a loop of links is the latter
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise SparsightError(f"{str(out)[:80]}: cannot be a folder ({reason}); choose another") from error
    return out
