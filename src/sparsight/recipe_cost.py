"""What a whole recipe will take: `plan --cost` with the recipe's own settings, and how often every stage runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsight import recipe as recipes
from sparsight.data import read
from sparsight.errors import SparsightError
from sparsight.plan.forecast import Forecast
from sparsight.plan.foretell import cost
from sparsight.restore.schedule import Schedule
from sparsight.sweep.grid import DEFAULTS, Cell, cells
from sparsight.sweep.run import EXTRA, SECTIONS

SAME = ("sparsity", "pattern", "ignore", "method", "refine", "update", "propagate", "samples", "batch_size")
NAMES = {  # keywords of the verbs that decide what they take, and how `cost` calls them
    "restore": {
        "adapter": "adapter", "rank": "rank", "teacher_mode": "teacher_mode", "kl": "kl", "batch_size": "restore_batch_size",
        "accumulate": "accumulate", "gradient_checkpointing": "gradient_checkpointing",
    },
    "evaluate": {
        "batch_size": "eval_batch_size", "max_new_tokens": "max_new_tokens", "beams": "beams",
    },
}  # fmt: skip
UNKNOWN = {
    "prune": ("reconstruct", "permute"),
    "restore": ("reconstruct", "hidden", "held_out", "tune", "mixed_precision"),
}  # not counted


def recipe_cost(recipe: str | Path, changes: Sequence[str] = (), *, verb: str | None = None, timed: bool = True) -> Forecast:
    """Foretell FLOPs, bytes and peak memory of a recipe for `run` or, where it has a grid, for `sweep`, on a CPU.

    Data must be there, weights need not. Of a grid whose cells differ in more than sparsity every stage is told as the
    one with the largest peak; `times` says how often it runs, `total` the FLOPs of all of them, each counted as if it stood
    alone (with `propagate: dense` cells share a walk), `without` which settings are not counted in. `verb`, `run` or
    `sweep`, refuses a recipe of the other.

    **Raises** `SparsightError` for a recipe that could not run, and for methods whose cost is not known.
    """
    asked = recipes.read(recipe, changes, sections=SECTIONS, extra=EXTRA)
    recipes.check_values(asked)
    if verb and (verb == "sweep") != ("grid" in asked):
        other, has = ("run", "no grid") if verb == "sweep" else ("sweep", "a grid")
        raise SparsightError(f"{recipe}: has {has}; ask sparsight {other} for it")
    if (asked.get("device") or "cpu") != "cpu":
        raise SparsightError(f"device: memory is foretold of a process on the CPU, not on {asked['device']}; leave it out")
    if not isinstance(asked.get("held_out"), str):
        raise SparsightError(f"{recipe}: held_out is missing; name the samples to score on, which are not those of data")
    if "grid" in asked:
        wanted = cells(asked)
    else:
        prune = {**DEFAULTS, "propagate": "block", **(asked.get("prune") or {})}
        pruned = Cell(prune, seed=prune.pop("seed", 0))
        wanted = [Cell(), pruned, *([replace(pruned, restore=asked["restore"])] if asked.get("restore") is not None else [])]
    sizes = {key: len(list(read(asked[key], skip_bad=bool(asked.get("skip_bad"))))) for key in ("data", "held_out")}
    found: dict[str, tuple[Cell, Forecast]] = {}
    total, walked = dict.fromkeys(("prune", "restore", "evaluate"), 0), set()
    for cell in wanted:
        if cell.prune:
            options = _options(asked, cell, sizes)
            kind = repr({k: v for k, v in options.items() if k not in ("sparsity", "pattern", "ignore", "seed")})
            found[kind] = found.get(kind) or (cell, cost(asked["model"], **options, timed=timed))
            stage = found[kind][1]
            total["restore"] += stage["restore"].work if cell.restore is not None else 0
            total["prune"] += stage["prune"].work if cell.pruned not in walked else 0
            walked.add(cell.pruned)
    restored = [cell for cell in wanted if cell.restore is not None]
    times = {"prune": len({c.pruned for c in wanted if c.prune}), "restore": len(restored), "evaluate": len(wanted)}
    stages = []
    for name in ("load", *(stage for stage, count in times.items() if count)):
        told = [forecast[name] for cell, forecast in found.values() if name != "restore" or cell.restore is not None]
        stages.append(max(told, key=lambda stage: stage.peak))
    first = next(iter(found.values()))[1]
    total["evaluate"] = len(wanted) * first["evaluate"].work
    return replace(first, stages=tuple(stages), times=times, total=total, without=_without(wanted))


def _without(wanted: Sequence[Cell]) -> tuple[str, ...]:
    """Settings of any cell whose cost is not known before they run."""
    given = {
        f"{section}.{name}"
        for cell in wanted
        for section, settings in (("prune", cell.prune), ("restore", cell.restore or {}))
        for name in UNKNOWN[section]
        if settings.get(name) not in (None, False, 0, "no")
    }
    return tuple(sorted(given))


def _options(asked: Mapping[str, Any], cell: Cell, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What `cost` is asked for one cell."""
    sections: dict[str, Any] = {"restore": cell.restore or {}, "evaluate": asked.get("evaluate") or {}}
    options = {name: cell.prune[name] for name in SAME} | {"policy": cell.policy, "seed": cell.seed}
    for section, calls in NAMES.items():
        options |= {ours: sections[section][name] for name, ours in calls.items() if name in sections[section]}
    restore, taken = sections["restore"], sizes["data"]
    schedule = Schedule(**{k: restore[k] for k in ("steps", "epochs", "batch_size", "accumulate") if k in restore})
    options["steps"] = schedule.total(min(restore.get("samples") or taken, taken))
    options["eval_samples"] = min(sections["evaluate"].get("samples") or sizes["held_out"], sizes["held_out"])
    shared = {key: asked[key] for key in ("dtype", "family", "skip_bad", "data") if asked.get(key)}
    return options | shared
