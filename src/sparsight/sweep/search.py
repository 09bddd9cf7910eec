"""`search`: find the best split of a budget, confirm it by answers to held-out samples, and write the model it gives."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sparsight
from sparsight.errors import SparsightError
from sparsight.evaluate import Result
from sparsight.model.checkpoint import Record, atomic_folder, check_output, read_record, save, sparsity_record
from sparsight.settings import whole_name
from sparsight.sweep.grid import Cell
from sparsight.sweep.splits import Progress, Splits, Tried, sparsest
from sparsight.sweep.workbench import Workbench

OVER = ("components", "blocks")


@dataclass(frozen=True)
class Found:
    """What a search found: the chosen plan, what the split that was given does, and what it cost to know.

    Scores are exact match on the held-out samples; `steps` are the budgets tried for a score to keep.
    """

    chosen: Tried
    given: Tried
    budget: float
    dense_score: dict[str, Any]
    chosen_score: dict[str, Any]
    given_score: dict[str, Any]
    tried: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    measurements: int
    evaluations: int
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        plain = {key: value for key, value in self.__dict__.items() if key not in ("chosen", "given")}
        return {"chosen": self.chosen.facts, "given": self.given.facts, **plain}


def search(
    recipe: Mapping[str, Any], out: str | Path, cell: Cell, *, blocks: bool, within: float | None, overwrite: bool,
    progress: Progress | None = None,
) -> Found:  # fmt: skip
    """See `sparsight.verbs.search`; `recipe` says model, data and how to evaluate, `cell` how to prune."""
    began = time.perf_counter()
    target = check_output(out, overwrite, inputs=(recipe["model"], recipe["data"], recipe["held_out"]))
    cell.choice()
    if read_record(recipe["model"]):
        raise SparsightError(f"{recipe['model']}: is pruned already; search among splits of the dense model")
    with tempfile.TemporaryDirectory(prefix="sparsight-search-") as work:
        bench = Workbench(recipe, Path(work))
        splits = Splits(bench, cell, progress)
        dense = bench.score()
        steps: list[dict[str, Any]] = []
        spent = 0
        if within is None:
            chosen = splits.best(blocks)
            result = splits.answers(chosen)
        else:
            splits, chosen, result, steps = sparsest(bench, cell, within, _score, blocks=blocks, progress=progress)
            spent = len(steps) - 1
        given = next(iter(splits.tried.values()))
        beside = result if given.plan == chosen.plan else splits.answers(given)
        found = Found(
            chosen, given, splits.budget, _row(dense), _row(result), _row(beside),
            [tried.facts for tried in splits.tried.values()], steps, splits.measurements,
            2 + spent + (given.plan != chosen.plan), time.perf_counter() - began,
        )  # fmt: skip
        _save(splits, replace(cell, prune={**cell.prune, "sparsity": dict(chosen.components)}), found, target, overwrite)
    return found


def _score(result: Result) -> float:
    return result.value("exact_match")


def _row(result: Result) -> dict[str, Any]:
    return next(row for row in result.rows if row["metric"] == "exact_match" and row["kind"] == "all")


def _save(splits: Splits, cell: Cell, found: Found, target: Path, overwrite: bool) -> None:
    """Prune once more by the chosen plan and write the model, with `search.json` beside it."""
    bench, plan = splits.bench, found.chosen.plan
    pruned = bench.prune(cell, plan)
    try:
        record = sparsity_record(
            bench.body, plan, base_model=whole_name(bench.recipe["model"]), method=cell.named,
            mask_only=cell.choice().mask_only, family=bench.family,
        )  # fmt: skip
        recipe = {"sparsight": sparsight.__version__, "prune": {**cell.facts, "policy": "search"}}
        written = Record(record, {"prune": {**pruned.__dict__, "skipped_samples": 0}}, recipe)
        with atomic_folder(target, overwrite) as new:
            save(bench.model, bench.processor, written, new)
            (new / "search.json").write_text(json.dumps(found.facts, indent=1) + "\n", encoding="utf-8")
    finally:
        bench.undo()
