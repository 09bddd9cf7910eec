"""The cost of a whole recipe: the estimate of its settings, and how often every stage runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsight import recipe as recipes
from sparsight.data import read_with
from sparsight.errors import SparsightError
from sparsight.estimation.estimate import Estimate, estimate, uncounted
from sparsight.recipe import spec_of
from sparsight.restoring.trainer import total_steps
from sparsight.specs import EvaluateSpec, RestoreSpec
from sparsight.sweeps.grid import Cell, cells
from sparsight.sweeps.sweep import EXTRA


def estimate_recipe(
    recipe: str | Path, changes: Sequence[str] = (), *, verb: str | None = None, timed: bool = True
) -> Estimate:
    """Estimate FLOPs, bytes and peak memory of a recipe for `run` or, where it has a grid, for `sweep`, on a CPU.

    Data must be there, weights need not. Of a grid whose cells differ in more than sparsity every stage is that of the cell
    with the largest peak; `times` is how often it runs, `total` the FLOPs of all its runs, each counted by itself (with
    `propagate: dense` cells share a walk), `without` the settings that are not counted. With `verb`, `run` or `sweep`, a
    recipe of the other is refused.

    **Raises** `SparsightError` for a recipe that could not run, and for methods whose cost is not known.
    """
    settings = recipes.read(recipe, changes, extra=(*EXTRA, "search"))
    if settings.get("search") is not None:
        raise SparsightError(f"{recipe}: search: its cost is not known before it runs; leave it out")
    if verb and (verb == "sweep") != ("grid" in settings):
        other, has = ("run", "no grid") if verb == "sweep" else ("sweep", "a grid")
        raise SparsightError(f"{recipe}: has {has}; ask sparsight {other} for it")
    if (settings.get("device") or "cpu") != "cpu":
        raise SparsightError(
            f"device: memory is estimated of a process on the CPU, not on {settings['device']}; leave it out"
        )
    recipes.held_out_of(settings, recipe)
    if "grid" in settings:
        grid = cells(settings)
    else:
        pruned = Cell(spec_of(settings, "prune"))
        grid = [
            Cell(),
            pruned,
            *([replace(pruned, restore=settings["restore"])] if settings.get("restore") is not None else []),
        ]
    sizes = {
        "data": len(read_with(settings["data"], spec_of(settings, "prune"))),
        "held_out": len(read_with(settings["held_out"], spec_of(settings, "evaluate"), held_out=True)),
    }
    estimates: dict[str, tuple[Cell, Estimate]] = {}
    total, walked = dict.fromkeys(("prune", "restore", "evaluate"), 0), set()
    for cell in grid:
        if cell.prune:
            restore, evaluate = _restoration(settings, cell, sizes), _evaluation(settings, sizes)
            facts = {k: v for k, v in cell.facts.items() if k not in ("sparsity", "pattern", "ignore", "seed", "restore")}
            kind = repr((facts, restore.facts()))
            if kind not in estimates:
                prune = replace(cell.prune, policy=cell.policy)
                made = estimate(
                    settings["model"], prune, restore, evaluate, data=settings["data"], timed=timed, streamed=False
                )
                estimates[kind] = cell, made
            stage = estimates[kind][1]
            total["restore"] += stage["restore"].work if cell.restore is not None else 0
            total["prune"] += stage["prune"].work if cell.pruning_id not in walked else 0
            walked.add(cell.pruning_id)
    restored = [cell for cell in grid if cell.restore is not None]
    times = {"prune": len({c.pruning_id for c in grid if c.prune}), "restore": len(restored), "evaluate": len(grid)}
    stages = []
    for name in ("load", *(stage for stage, count in times.items() if count)):
        candidates = [made[name] for cell, made in estimates.values() if name != "restore" or cell.restore is not None]
        stages.append(max(candidates, key=lambda stage: stage.peak))
    first = next(iter(estimates.values()))[1]
    total["evaluate"] = len(grid) * first["evaluate"].work
    without = sorted({name for cell in grid for name in _uncounted(settings, cell)})
    return replace(first, stages=tuple(stages), times=times, total=total, without=tuple(without))


def _uncounted(settings: Mapping[str, Any], cell: Cell) -> list[str]:
    """Settings of a cell whose cost is not counted, by section and name."""
    restore = [] if cell.restore is None else uncounted(spec_of(settings, "restore", cell.restore))
    return [f"prune.{name}" for name in (uncounted(cell.prune) if cell.prune else ())] + [f"restore.{x}" for x in restore]


def _restoration(settings: Mapping[str, Any], cell: Cell, sizes: Mapping[str, int]) -> RestoreSpec:
    """How a cell is restored, in steps."""
    spec = spec_of(settings, "restore", cell.restore or {})
    return replace(spec, steps=total_steps(spec, min(spec.samples or sizes["data"], sizes["data"])), seed=cell.seed)


def _evaluation(settings: Mapping[str, Any], sizes: Mapping[str, int]) -> EvaluateSpec:
    """How a cell is scored, in samples."""
    spec = spec_of(settings, "evaluate")
    return replace(spec, samples=min(spec.samples or sizes["held_out"], sizes["held_out"]))
