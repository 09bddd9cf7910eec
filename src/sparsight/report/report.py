"""The verb: read runs, check where the page goes, write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsight.errors import NotWritten, SparsightError
from sparsight.report.page import MARK, write_page
from sparsight.report.runs import read_runs


def report(
    runs: Sequence[str | Path],
    *,
    out: str | Path = "report.html",
    metric: str | None = None,
    figures: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Compare runs on one self-contained HTML page; the first is what the others are set against.

    `runs` are folders of models that `evaluate` has recorded, and of sweeps. `metric` takes the place of exact match;
    `figures` is a folder for every figure as SVG and PNG.

    **Raises** `SparsightError` before anything is drawn for a folder that has no run, and for a file that would be lost.
    """
    target = Path(out)
    _check(target, overwrite)
    found = read_runs([runs] if isinstance(runs, str | Path) else runs)
    beside = target.with_name(f".{target.name}.new")
    try:
        written = write_page(found, beside, metric=metric, figures=figures)
        written.replace(target)
    except OSError as error:
        raise NotWritten(f"{target}: could not be written ({error.strerror or error})") from error
    finally:
        beside.unlink(missing_ok=True)
    return target


def _check(target: Path, overwrite: bool) -> None:
    """Refuse a page that cannot be written, or that would take the place of what is no page."""
    if target.is_dir():
        raise SparsightError(f"--out: {target} is a folder; give the name of a page, as {target / 'report.html'}")
    if not target.parent.is_dir():
        raise SparsightError(
            f"--out: {target} cannot be written, there is no folder {target.parent}; make it, or give another"
        )
    if target.exists():
        if not overwrite:
            raise SparsightError(f"--out: {target} exists; give another name, or add --overwrite")
        if not is_page(target):
            raise SparsightError(f"--out: {target} is not a page of report, so --overwrite does not replace it")


def is_page(path: Path) -> bool:
    """Whether a file was written by `report`."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(400)
