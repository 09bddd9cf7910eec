"""`search`: find the best split of a budget, score it on held-out samples, and write the pruned model."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsight.checkpoint.folder import Record, atomic_folder, read_record, sparsity_record, write_model
from sparsight.checkpoint.lock import locked
from sparsight.checks import whole_name
from sparsight.errors import SparsightError
from sparsight.evaluation.evaluate import Result, headline
from sparsight.files import check_output
from sparsight.memory import enough_memory
from sparsight.model.load import check_device
from sparsight.progress import Progress
from sparsight.pruning.compose import describe
from sparsight.specs import SearchSpec
from sparsight.sweeps.grid import Cell
from sparsight.sweeps.splits import Candidate, Splits, sparsest
from sparsight.sweeps.workbench import Workbench
from sparsight.version import VERSION


@dataclass(frozen=True)
class SearchResult:
    """The result of a search: the best plan, the split it started from, and the cost of the search.

    Scores are rows of the metric on the held-out samples; `tried` are all measured plans, `steps` the budgets that `within`
    measured.
    """

    chosen: Candidate
    given: Candidate
    budget: float
    dense_score: dict[str, Any]
    chosen_score: dict[str, Any]
    given_score: dict[str, Any]
    tried: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    measurements: int
    evaluations: int
    seconds: float
    data: dict[str, Any] = field(default_factory=dict)  # what was read of data and of held-out data, where that is not all

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as plain values."""
        plain = {key: value for key, value in self.__dict__.items() if key not in ("chosen", "given")}
        if not self.data:
            del plain["data"]
        return {"chosen": self.chosen.facts, "given": self.given.facts, **plain}


def check_search(spec: SearchSpec) -> Cell:
    """The pruning that a search starts from. **Raises** `SparsightError` for settings that leave nothing to search."""
    check_device(spec.device)
    cell = Cell(spec.prune())
    if cell.policy != "uniform":
        raise SparsightError(
            f"`method`: {spec.method} shares its sparsity by a policy of its own; name a method without one"
        )
    if spec.over == "components" and spec.within is None and len(cell.facts["sparsity"]) < 2:
        raise SparsightError("`over`: one component alone has nothing to share with; use blocks, or name two in `sparsity`")
    cell.composition()
    return cell


def search(
    model: str | Path,
    out: str | Path,
    spec: SearchSpec,
    *,
    data: Any,
    held_out: Any,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the best split of a budget, and write the pruned model; errors (`SparsightError`) as in `sparsight.search`."""
    cell = check_search(spec)
    evaluate: dict[str, Any] = {"max_new_tokens": spec.max_new_tokens, "samples": spec.held_out_samples, "seed": spec.seed}
    evaluate |= {"split": spec.held_out_split, "task": spec.held_out_task, "prompt": spec.held_out_prompt}
    if spec.metric not in (None, "exact_match"):
        evaluate["metrics"] = [spec.metric, "exact_match"]
    recipe = {
        "model": str(model), "data": str(data), "held_out": str(held_out), "dtype": spec.dtype, "device": spec.device,
        "family": spec.family, "skip_bad": spec.skip_bad, "images": spec.images, "max_length": spec.max_length,
        "evaluate": evaluate,
    }  # fmt: skip
    target = check_output(out, overwrite, inputs=(model, data, held_out))
    if read_record(model):
        raise SparsightError(f"{model}: is pruned already; search among splits of the dense model")
    with locked(target), enough_memory(spec):
        return _search(recipe, target, cell, spec, overwrite, progress)


def _search(
    recipe: Mapping[str, Any], target: Path, cell: Cell, spec: SearchSpec, overwrite: bool, progress: Progress | None
) -> SearchResult:
    """`recipe` names model and data and how to evaluate, `cell` how to prune."""
    began, blocks = time.perf_counter(), spec.over == "blocks"

    def row(result: Result) -> dict[str, Any]:
        return dict(headline(result.rows, spec.metric))

    with tempfile.TemporaryDirectory(prefix="sparsight-search-") as work:
        bench = Workbench(recipe, Path(work))
        splits = Splits(bench, cell, progress)
        dense = bench.score()
        steps: list[dict[str, Any]] = []
        if spec.within is None:
            best = splits.best(blocks)
            result = splits.answers(best)
        else:
            least = row(dense)["value"] - spec.within
            splits, best, result, steps = sparsest(
                bench, cell, least, lambda result: row(result)["value"], blocks=blocks, progress=progress
            )  # fmt: skip
        first = splits.candidates[0]
        beside = result if first.plan == best.plan else splits.answers(first)
        done = SearchResult(
            best, first, splits.budget, row(dense), row(result), row(beside),
            [candidate.facts for candidate in splits.candidates], steps,
            sum(x["measurements"] for x in steps) or splits.measurements,
            1 + max(1, len(steps)) + (first.plan != best.plan), time.perf_counter() - began, _read(bench, splits),
        )  # fmt: skip
        pruning = replace(cell, prune=replace(cell.pruning, sparsity=dict(best.components)))
        _save(splits, pruning, done, spec, target, overwrite)
    return done


def _read(bench: Workbench, splits: Splits) -> dict[str, Any]:
    facts = {"data": bench.calibration(splits.cell).read, "held_out": bench.held_out_facts}
    return {key: read for key, read in facts.items() if read}


def _save(splits: Splits, cell: Cell, done: SearchResult, spec: SearchSpec, target: Path, overwrite: bool) -> None:
    """Prune once more by the best plan and write the model, with `search.json` beside it."""
    bench, plan = splits.bench, done.chosen.plan
    record = bench.prune(cell, plan)
    record.skipped_samples, plan = len(bench.encoder.skipped), record.pruned(plan)
    try:
        facts = sparsity_record(
            bench.body, plan, base_model=whole_name(bench.recipe["model"]), method=describe(cell.pruning),
            mask_only=cell.composition().mask_only, family=bench.family,
        )  # fmt: skip
        model, data, held_out = (whole_name(bench.recipe[key]) for key in ("model", "data", "held_out"))
        recipe: dict[str, Any] = {"sparsight": VERSION, "model": model, "data": data, "held_out": held_out}
        settings = spec.facts()
        family = settings.pop("family")
        for key, name in (("data", "split"), ("held_out", "held_out_split")):
            settings |= {name: part} if (part := done.data.get(key, {}).get("split")) else {}
        settings |= {"images": whole_name(spec.images)} if spec.images is not None else {}
        recipe |= {**({"family": family} if family else {}), "search": settings, "evaluate": None}
        with atomic_folder(target, overwrite) as new:
            write_model(bench.model, bench.processor, Record(facts, {"prune": record.measured()}, recipe), new)
            (new / "search.json").write_text(json.dumps(done.facts, indent=1) + "\n", encoding="utf-8")
    finally:
        bench.undo()
