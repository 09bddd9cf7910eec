"""The sweep: every cell of a grid once, in one process or several; a kill costs no finished cell.

A folder holds `sweep.json` (what is swept), `cells/` (a record and the answers of every finished cell), `results.csv`,
the figures and the page. A cell with a record is never run again: a sweep that is started again continues, with a larger
grid, too.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight import distributed
from sparsight import recipe as recipes
from sparsight.allocation.plan import check_plan
from sparsight.checkpoint.folder import read_record
from sparsight.checkpoint.lock import locked
from sparsight.checkpoint.unfinished import parents
from sparsight.checks import check_count
from sparsight.data import read_with
from sparsight.errors import Interrupted, Notice, SparsightError
from sparsight.evaluation.evaluate import ALL
from sparsight.evaluation.metrics import METRICS
from sparsight.evaluation.record import PICTURES, SHOWN, environment, write_pictures
from sparsight.files import replace_file, write_json
from sparsight.model.load import check_device
from sparsight.progress import Progress
from sparsight.reporting.report import is_page, report
from sparsight.sweeps.grid import Cell, cells
from sparsight.sweeps.workbench import FORMAT, Workbench, measure
from sparsight.sweeps.worker import WORK, dispatch

EXTRA = ("grid", "seeds")
IDENTITY = ("format", "model_hash", "data_fingerprint", "held_out_fingerprint", "evaluate", "dtype", "family", "skip_bad")
COLUMNS = (
    "id", "label", "seed", "pattern", "method", "policy", "restore", "vision", "connector", "language", "parameters",
    "zeros", "bytes", "packed_bytes", "exact_match", "low", "high", "questions", "captions", "seconds",
)  # fmt: skip


def sweep(
    recipe: str | Path, out: str | Path, *, changes: Sequence[str] = (), jobs: int = 1, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Prune, restore and score a model in every way of a grid; errors (`SparsightError`) as in `sparsight.sweep`."""
    settings = recipes.read(recipe, changes, extra=EXTRA)
    check_count("jobs", jobs)
    if distributed.launched_rank():
        raise SparsightError("`jobs`: a sweep starts its own processes; start it without a launcher")
    with recipes.in_recipe("evaluate"):
        check_device(recipes.spec_of(settings, "evaluate").device)
    recipes.held_out_of(settings, recipe)
    grid, folder = cells(settings), Path(out)
    if read_record(settings["model"]):
        raise SparsightError(f"{settings['model']}: is pruned already; sweep over the dense model that it was made of")
    with locked(folder):
        state = recipes.read_state(folder, "sweep.json", "sweep")
        page = folder / "report.html"
        if page.exists() and not (page.is_file() and is_page(page)):
            raise SparsightError(f"{page}: is no page of a report, and a sweep writes one there; move it away")
        with parents(folder / "sweep.json"):
            return _sweep(settings, grid, folder, state, jobs, progress)


def _sweep(
    settings: Mapping[str, Any], grid: Sequence[Cell], folder: Path, state: Mapping[str, Any] | None, jobs: int,
    progress: Progress | None,
) -> list[dict[str, Any]]:  # fmt: skip
    drawn = importlib.util.find_spec("matplotlib") is not None  # of the extra `report`
    if not drawn:
        line = "the page and the figures need matplotlib, so none are written: pip install 'sparsight[report]'"
        warnings.warn(f"{line}, then sparsight report {folder}", Notice, stacklevel=2)
    bench, facts = _open(settings, grid, folder, state)
    write_json(folder / "sweep.json", facts)
    (folder / "cells").mkdir(exist_ok=True)
    write_pictures(bench.held_out[:SHOWN], folder / PICTURES)
    missing = units([cell for cell in grid if not _record(folder, cell).is_file()])
    tally = _Tally(progress, len(grid) - sum(map(len, missing)), len(grid))
    try:
        if jobs == 1 or len(missing) < 2:
            for unit in missing:
                measure(bench, unit, folder / "cells", tally)
        else:
            del bench  # every process has its own
            dispatch(missing, settings, folder, jobs, tally)
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"interrupted; {tally.finished} of {tally.total} cells are finished: the same command goes on"
        ) from stop
    shutil.rmtree(folder / WORK, ignore_errors=True)
    records = [_read(_record(folder, cell)) for cell in grid]
    write_results(records, folder / "results.csv")
    if drawn:
        report([folder], out=folder / "report.html", figures=folder / "figures", overwrite=True)
    return records


def _open(
    settings: Mapping[str, Any], grid: Sequence[Cell], folder: Path, state: Mapping[str, Any] | None
) -> tuple[Workbench, dict[str, Any]]:
    """Open the workbench and collect the content of `sweep.json`; refuse everything that can be refused."""
    facts = _facts(settings)
    _check_same(folder, state, facts)
    bench = Workbench(settings, folder / WORK)
    facts["model_hash"] = bench.hash()
    _check_same(folder, state, facts)
    for cell in grid:
        if cell.prune:
            check_plan(bench.body, cell.prune, cell.policy)
    return bench, facts


def _record(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.id}.json"


def _read(record: Path) -> dict[str, Any]:
    """A finished cell. **Raises** `SparsightError` for one that is damaged, or whose answers are."""
    try:
        facts = dict(json.loads(record.read_text(encoding="utf-8")))
        row(facts, record.with_suffix(".jsonl"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise SparsightError(
            f"{record}: is damaged ({reason}); delete it, and the same command measures it again"
        ) from error
    return facts


def units(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group the cells that share a pruning, ordered by seed."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        groups.setdefault((cell.seed, cell.pruning_id), []).append(cell)
    return list(groups.values())


class _Tally:
    """Counts finished cells and reports them."""

    def __init__(self, progress: Progress | None, finished: int, total: int) -> None:
        self.progress, self.finished, self.total = progress, finished, total

    def __call__(self, note: str, finished: int = 0) -> None:
        self.finished += finished
        if self.progress:
            self.progress(note, self.finished, self.total)


def _facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    skip_bad = bool(settings.get("skip_bad"))
    parts = {
        "data": read_with(settings["data"], recipes.spec_of(settings, "prune")),
        "held_out": read_with(settings["held_out"], recipes.spec_of(settings, "evaluate"), held_out=True),
    }
    read = {key: part.facts for key, part in parts.items() if part.facts}
    return {
        "format": FORMAT,
        **{key: settings[key] for key in ("model", "data", "held_out")},
        **{f"{key}_fingerprint": part.fingerprint for key, part in parts.items()},
        **({"read": read} if read else {}),
        "evaluate": dict(settings.get("evaluate") or {}),
        "dtype": settings.get("dtype") or "auto",
        "family": settings.get("family"),
        "skip_bad": skip_bad,
        "grid": {key: settings.get(key) for key in ("grid", "seeds", "prune", "restore")},
        "environment": environment(),
    }


def _check_same(folder: Path, state: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> None:
    for key in IDENTITY if state is not None else ():
        if key in facts and state is not None and state.get(key) != facts[key]:
            words = key.removesuffix("_hash").removesuffix("_fingerprint").replace("_", "-")
            raise SparsightError(
                f"{folder}: holds a sweep with another {words} ({state.get(words.replace('-', '_'))}); give another folder"
            )


def write_results(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per cell: settings, zeros, bytes, exact match of all, of questions and of captions, and other metrics."""
    rows = [row(record, path.parent / "cells" / f"{record['id']}.jsonl") for record in records]
    more = dict.fromkeys(key for one in rows for key in one if key not in COLUMNS)
    with replace_file(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *more])
        writer.writeheader()
        writer.writerows(rows)


def row(record: Mapping[str, Any], answers: Path) -> dict[str, Any]:
    """A cell's line in the table of results. **Raises** `ValueError` where its answers are not all there."""
    cell, components = record["cell"], record["components"]
    scores = {r["metric"]: r for r in record["scores"] if r["kind"] == ALL}
    match = scores.pop("exact_match", {})
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    if len(lines) != record.get("answers", len(lines)):
        raise ValueError(f"{answers.name} has {len(lines)} of {record['answers']} answers")
    questions = [line["correct"] for line in lines if line["kind"] != "caption"]
    captions = [line["correct"] for line in lines if line["kind"] == "caption"]
    amounts = {c: x["zeros"] / x["parameters"] if x["parameters"] else 0.0 for c, x in components.items()}
    return {
        **{key: record[key] for key in ("id", "label", "parameters", "bytes", "packed_bytes")},
        **{key: cell[key] for key in ("seed", "pattern", "method", "policy")},
        "restore": json.dumps(cell["restore"]) if cell["restore"] is not None else "",
        **{component: f"{amount:.6f}" for component, amount in amounts.items()},
        "zeros": sum(x["zeros"] for x in components.values()),
        **{key: match.get(name, "") for key, name in (("exact_match", "value"), ("low", "low"), ("high", "high"))},
        "questions": sum(questions) / len(questions) if questions else "",
        "captions": sum(captions) / len(captions) if captions else "",
        "seconds": f"{sum(record['seconds'].values()):.2f}",
        **{metric: r["value"] for metric, r in scores.items() if metric in METRICS},  # those of tokens: last bits differ
    }
