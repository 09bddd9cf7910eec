"""`search`: find the best split of a budget, confirm it by answers to held-out samples, and write the model it gives."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sparsight
from sparsight.errors import SparsightError
from sparsight.evaluate import Result
from sparsight.model.checkpoint import Record, atomic_folder, check_output, read_record, save, sparsity_record
from sparsight.model.load import check_device, parse_dtype
from sparsight.settings import check_choice, check_seed, check_whole, plain, whole_name
from sparsight.sweep.grid import DEFAULTS, Cell
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
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    held_out: str | Path,
    sparsity: str | float | Mapping[str, float] = 0.5,
    within: float | None = None,
    over: str = "blocks",
    pattern: str = "row",
    method: str = "wanda",
    refine: str | None = None,
    update: str | None = None,
    reconstruct: int = 0,
    tokens: str = "all",
    ignore: Sequence[str] = (),
    family: str | None = None,
    propagate: str = "dense",
    samples: int = 128,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    held_out_samples: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Found:
    """Find the split of a budget that harms the model's answers least, and write the model pruned by it to `out`.

    `sparsity` sets the budget, the zeros that this split spends, and is what the result is compared with; the search
    moves zeros between its components, and `over="blocks"` between their blocks, too. Plans are compared by their
    divergence from the dense model on calibration samples; the chosen and the given one are then scored on `held_out`.
    With `within` it is asked the other way round: the sparsest plan of that shape whose score is at most so much below
    the dense model's.
    """
    check_choice("--over", over, OVER)
    parse_dtype(dtype)
    check_device(device)
    check_seed(seed)
    check_whole("--held-out-samples", held_out_samples, optional=True)
    for option, value in (("--samples", samples), ("--batch-size", batch_size), ("--max-new-tokens", max_new_tokens)):
        check_whole(option, value)
    if within is not None and not 0 <= within < 1:
        raise SparsightError(f"--within: {within:g} is not a loss of score; give a fraction, as 0.02 for two points")
    settings = plain(locals(), "sparsity", "pattern", "method", "refine", "update", "reconstruct", "tokens", "ignore")
    settings |= plain(locals(), "propagate", "samples", "batch_size")
    recipe = {
        "model": str(model), "data": str(data), "held_out": str(held_out), "dtype": dtype, "device": device,
        "family": family, "skip_bad": skip_bad,
        "evaluate": {"max_new_tokens": max_new_tokens, "samples": held_out_samples, "seed": seed},
    }  # fmt: skip
    cell = Cell({**DEFAULTS, **settings}, None, seed)
    if cell.policy != "uniform":
        raise SparsightError(f"--method: {method} shares its sparsity by a policy of its own; name a method without one")
    if over == "components" and within is None and len(cell.facts["sparsity"]) < 2:
        raise SparsightError("--over: one component alone has nobody to share with; use blocks, or name two in --sparsity")
    return _search(recipe, out, cell, blocks=over == "blocks", within=within, overwrite=overwrite, progress=progress)


def _search(
    recipe: Mapping[str, Any], out: str | Path, cell: Cell, *, blocks: bool, within: float | None, overwrite: bool,
    progress: Progress | None = None,
) -> Found:  # fmt: skip
    """`recipe` says model, data and how to evaluate, `cell` how to prune."""
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
        if within is None:
            chosen = splits.best(blocks)
            result = splits.answers(chosen)
        else:
            least = _score(dense) - within
            splits, chosen, result, steps = sparsest(bench, cell, least, _score, blocks=blocks, progress=progress)
        given = splits.tried[0]
        beside = result if given.plan == chosen.plan else splits.answers(given)
        found = Found(
            chosen, given, splits.budget, _row(dense), _row(result), _row(beside),
            [tried.facts for tried in splits.tried], steps,
            sum(x["measurements"] for x in steps) or splits.measurements,
            1 + max(1, len(steps)) + (given.plan != chosen.plan), time.perf_counter() - began,
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
        written = Record(record, {"prune": {**pruned.__dict__, "skipped_samples": len(bench.encoder.skipped)}}, recipe)
        with atomic_folder(target, overwrite) as new:
            save(bench.model, bench.processor, written, new)
            (new / "search.json").write_text(json.dumps(found.facts, indent=1) + "\n", encoding="utf-8")
    finally:
        bench.undo()
