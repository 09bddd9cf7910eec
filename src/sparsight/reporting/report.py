"""The verb `report`: read runs, check where the page goes, write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsight.checks import need_packages
from sparsight.errors import SparsightError


def report(
    runs: Sequence[str | Path],
    *,
    out: str | Path = "report.html",
    metric: str | None = None,
    figures: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Compare runs on one self-contained HTML page; the first is what the others are set against.

    `runs` are folders of models that `evaluate` has recorded, folders of sweeps, and logs of lmms-eval. `metric` takes
    the place of exact match; `figures` is a folder for every figure as SVG and PNG. The path of the page is returned.

    **Raises** `SparsightError` before anything is drawn for a folder that has no run, and for a file that would be lost.
    """
    target = Path(out)
    if target.is_dir():
        raise SparsightError(f"`out`: {target} is a folder; give the name of a page, as {target / 'report.html'}")
    if not target.parent.is_dir():
        raise SparsightError(
            f"`out`: {target} cannot be written, there is no folder {target.parent}; make it, or give another"
        )
    if target.exists() and not overwrite:
        raise SparsightError(f"`out`: {target} exists; give another name, or add `overwrite`")
    if target.exists() and not is_page(target):
        raise SparsightError(f"`out`: {target} is not a page of report, so `overwrite` does not replace it")
    for run in [runs] if isinstance(runs, str | Path) else runs:
        if not Path(run).exists():
            raise SparsightError(f"{run}: is not there; give folders that eval --record or sweep has written to")
    need_packages("the report", "report", matplotlib="matplotlib")
    from sparsight.reporting.page import write_page
    from sparsight.reporting.runs import read_runs

    models = read_runs([runs] if isinstance(runs, str | Path) else runs)
    return write_page(models, target, metric=metric, figures=figures)


def is_page(path: Path) -> bool:
    """Whether a file was written by `report`."""
    from sparsight.reporting.page import MARK

    with path.open("rb") as file:
        return MARK.encode() in file.read(400)
