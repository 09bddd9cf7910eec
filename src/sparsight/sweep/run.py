"""The sweep: every cell of a grid once, in one process or several, with results that a kill does not cost.

A folder holds `sweep.json` (what is swept), `cells/` (a record and the answers of every finished cell), `results.csv`,
the figures and the page. A cell whose record is there is never run again; started again, the sweep goes on, and a grid
may have grown by then.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight import recipe as recipes
from sparsight.data import read
from sparsight.errors import Interrupted, SparsightError
from sparsight.evaluate.record import PICTURES, SHOWN, environment, write_pictures
from sparsight.model.checkpoint import read_record
from sparsight.model.load import check_device, parse_dtype
from sparsight.report.report import is_page, report
from sparsight.settings import check_whole
from sparsight.sweep.grid import Cell, cells
from sparsight.sweep.lock import alone
from sparsight.sweep.workbench import FORMAT, Workbench, measure
from sparsight.sweep.worker import WORK, share

Progress = Callable[[str, int, int], None]

SECTIONS, EXTRA = ("prune", "restore", "evaluate"), ("grid", "seeds")
IDENTITY = ("format", "model_hash", "data_fingerprint", "held_out_fingerprint", "evaluate", "dtype", "family", "skip_bad")
COLUMNS = (
    "id", "label", "seed", "pattern", "method", "policy", "restore", "vision", "connector", "language", "parameters",
    "zeros", "bytes", "packed_bytes", "exact_match", "low", "high", "questions", "captions", "seconds",
)  # fmt: skip


def sweep(
    recipe: str | Path,
    out: str | Path,
    *,
    changes: Sequence[str] = (),
    jobs: int = 1,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Prune, restore and score a model in every way that a recipe's grid says; the records of all its cells.

    `changes` are `key.sub=value` and stand for what the file says. A cell that `out` holds is not run again: started
    again, a sweep that was killed goes on. `jobs` processes work at a time, each with a model of its own and its share of
    the threads, or a GPU of its own. `out` gets a record and the answers of every cell, `results.csv`, figures and a page.

    **Raises** `SparsightError` before anything is computed or written for a recipe that cannot be run, and for a folder
    that holds something else, a sweep of another model among it.

    A process with another number of threads adds in another order, so that last bits, and now and then an answer, may
    differ between different `jobs`.
    """
    asked = recipes.read(recipe, changes, sections=SECTIONS, extra=EXTRA)
    recipes.check_values(asked)
    check_whole("--jobs", jobs)
    parse_dtype(asked.get("dtype") or "auto")
    check_device(asked.get("device") or "cpu")
    if not isinstance(asked.get("held_out"), str):
        raise SparsightError(f"{recipe}: held_out is missing; name the samples to score on, which are not those of data")
    wanted, folder = cells(asked), Path(out)
    told = recipes.told(folder, "sweep.json", "sweep")
    if read_record(asked["model"]):
        raise SparsightError(f"{asked['model']}: is pruned already; sweep over the dense model that it was made of")
    page = folder / "report.html"
    if page.exists() and not (page.is_file() and is_page(page)):
        raise SparsightError(f"{page}: is no page of a report, and a sweep writes one there; move it away")
    with alone(folder):
        return _swept(asked, wanted, folder, told, jobs, progress)


def _swept(
    asked: Mapping[str, Any], wanted: Sequence[Cell], folder: Path, told: Mapping[str, Any] | None, jobs: int,
    progress: Progress | None,
) -> list[dict[str, Any]]:  # fmt: skip
    bench, facts = _opened(asked, wanted, folder, told)
    _write(folder / "sweep.json", facts)
    (folder / "cells").mkdir(exist_ok=True)
    write_pictures(bench.held_out[:SHOWN], folder / PICTURES)
    left = [cell for cell in wanted if not _record(folder, cell).is_file()]
    tell = _Tally(progress, len(wanted) - len(left), len(wanted))
    try:
        if jobs == 1 or len(units(left)) < 2:
            for unit in units(left):
                measure(bench, unit, folder / "cells", tell)
        else:
            del bench  # every process has its own
            share(units(left), asked, folder, jobs, tell)
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted; {tell.done} of {tell.every} cells are finished: the same command goes on") from stop
    shutil.rmtree(folder / WORK, ignore_errors=True)
    records = [_read(_record(folder, cell)) for cell in wanted]
    write_results(records, folder / "results.csv")
    if importlib.util.find_spec("matplotlib"):  # of the extra `report`
        report([folder], out=folder / "report.html", figures=folder / "figures", overwrite=True)
    return records


def _opened(
    asked: Mapping[str, Any], wanted: Sequence[Cell], folder: Path, told: Mapping[str, Any] | None
) -> tuple[Workbench, dict[str, Any]]:
    """The model on a workbench, and what `sweep.json` says; everything that can be refused is refused here."""
    facts = _facts(asked)
    if told is not None:
        _check_same(folder, told, facts)
    bench = Workbench(asked, folder / WORK)
    facts["model_hash"] = bench.hash()
    if told is not None:
        _check_same(folder, told, facts)
    for cell in wanted:
        if cell.prune:
            bench.plan(cell, measured=False)
    return bench, facts


def _record(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.id}.json"


def _read(record: Path) -> dict[str, Any]:
    """A finished cell. **Raises** `SparsightError` for one that is damaged, or whose answers are."""
    try:
        found = dict(json.loads(record.read_text(encoding="utf-8")))
        row(found, record.with_suffix(".jsonl"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise SparsightError(
            f"{record}: is damaged ({reason}); delete it, and the same command measures it again"
        ) from error
    return found


def units(left: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share a pruning, together; those of a seed one after another."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in sorted(left, key=lambda cell: cell.seed):
        groups.setdefault((cell.seed, cell.pruned), []).append(cell)
    return list(groups.values())


class _Tally:
    """Counts finished cells and says so."""

    def __init__(self, progress: Progress | None, done: int, every: int) -> None:
        self.progress, self.done, self.every = progress, done, every

    def __call__(self, note: str, finished: int = 0) -> None:
        self.done += finished
        if self.progress:
            self.progress(note, self.done, self.every)


def _facts(asked: Mapping[str, Any]) -> dict[str, Any]:
    held = read(asked["held_out"], skip_bad=bool(asked.get("skip_bad")))
    data = read(asked["data"], skip_bad=bool(asked.get("skip_bad")))
    return {
        "format": FORMAT,
        "model": asked["model"],
        "data": asked["data"],
        "held_out": asked["held_out"],
        "data_fingerprint": data.fingerprint,
        "held_out_fingerprint": held.fingerprint,
        "evaluate": dict(asked.get("evaluate") or {}),
        "dtype": asked.get("dtype") or "auto",
        "family": asked.get("family"),
        "skip_bad": bool(asked.get("skip_bad")),
        "grid": {key: asked.get(key) for key in ("grid", "seeds", "prune", "restore")},
        "environment": environment(),
    }


def _check_same(folder: Path, told: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    for key in IDENTITY:
        if key in facts and told.get(key) != facts[key]:
            words = key.removesuffix("_hash").removesuffix("_fingerprint").replace("_", "-")
            raise SparsightError(
                f"{folder}: holds a sweep with another {words} ({told.get(words.replace('-', '_'))}); give another folder"
            )


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def write_results(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per cell: what was asked, zeros, bytes, and exact match of all, of questions and of captions."""
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for record in records:
            writer.writerow(row(record, path.parent / "cells" / f"{record['id']}.jsonl"))
    part.replace(path)


def row(record: Mapping[str, Any], answers: Path) -> dict[str, Any]:
    cell, components = record["cell"], record["components"]
    found = {r["kind"]: r for r in record["scores"] if r["metric"] == "exact_match"}
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    if len(lines) != record.get("answers", len(lines)):
        raise ValueError(f"{answers.name} has {len(lines)} of {record['answers']} answers")
    asked = [line["correct"] for line in lines if line["kind"] != "caption"]
    told = [line["correct"] for line in lines if line["kind"] == "caption"]
    amounts = {c: x["zeros"] / x["parameters"] if x["parameters"] else 0.0 for c, x in components.items()}
    return {
        **{key: record[key] for key in ("id", "label", "parameters", "bytes", "packed_bytes")},
        **{key: cell[key] for key in ("seed", "pattern", "method", "policy")},
        "restore": json.dumps(cell["restore"]) if cell["restore"] is not None else "",
        **{component: f"{amount:.6f}" for component, amount in amounts.items()},
        "zeros": sum(x["zeros"] for x in components.values()),
        **{key: found["all"][name] for key, name in (("exact_match", "value"), ("low", "low"), ("high", "high"))},
        "questions": sum(asked) / len(asked) if asked else "",
        "captions": sum(told) / len(told) if told else "",
        "seconds": f"{sum(record['seconds'].values()):.2f}",
    }
