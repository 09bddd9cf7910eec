"""The cells of a recipe's grid: every combination of its lists.

    seeds: [0, 1, 2]
    prune: {propagate: dense}          # what all cells share
    grid:                              # one product of lists, or several
      - sparsity: {sum: 1.0, vision: [0.1, 0.3, 0.5, 0.7]}       # the rest of the sum for language
      - sparsity: [{alone: vision, at: [0.3, 0.5]}, {alone: language, at: [0.3, 0.5]}]
      - pattern: ["2:4", "4:8"]
        restore: [null, {steps: 100, lr: 1e-3}]

Axes are the fields of `PruneSpec`, and `restore`, a section or null. The dense model is always a cell.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sparsight.allocation.plan import find_policy, planned_budget
from sparsight.checks import check_name_of, nearest
from sparsight.errors import SparsightError
from sparsight.model.families import COMPONENTS
from sparsight.options import options
from sparsight.pruning.compose import Composition, compose_spec, describe, policy_of
from sparsight.recipe import check_section, spec_of
from sparsight.restoring.verb import check_restore
from sparsight.shared_spec import SharedSpec
from sparsight.specs import PruneSpec

DENSE = "dense"
AXES = (*(name for name in options(PruneSpec) if name not in (*options(SharedSpec), "seed")), "restore")
Notify = Callable[..., None]  # (note, how many cells that finished)
DEFAULT_PROPAGATE = "dense"  # so that cells can share the walk


@dataclass(frozen=True)
class Cell:
    """One result: how to prune (None: the dense model), and the section of how to restore (None: not at all)."""

    prune: PruneSpec | None = None
    restore: Mapping[str, Any] | None = None

    @property
    def seed(self) -> int:
        """The seed of pruning and restoration."""
        return self.prune.seed if self.prune else 0

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All fields as plain values; `sparsity` has the fraction per component, whatever the pattern."""
        names = [name for name in options(PruneSpec) if name not in options(SharedSpec)]
        if not self.prune:
            return {**dict.fromkeys(names), "sparsity": {}, "restore": None, "seed": None}
        facts = self.prune.facts()
        _, budget = planned_budget(self.prune.pattern, self.prune.sparsity, self.policy)
        return {
            **{name: facts[name] for name in names if name in facts},
            "policy": self.policy,
            "sparsity": {component: amount for component, amount in budget.items() if amount},
            "restore": None if self.restore is None else dict(self.restore),
        }

    @property
    def policy(self) -> Any:
        """The policy that allocates the budget."""
        return policy_of(self.prune) if self.prune else None

    @property
    def label(self) -> str:
        """In words, without the seed."""
        if not self.prune:
            return DENSE
        facts = self.facts
        amounts = facts["sparsity"].values()
        same = set(facts["sparsity"]) == {"vision", "language"} and len(set(amounts)) == 1
        each = f"{100 * next(iter(amounts)):g}%" if same else ""
        words = [each or " ".join(f"{c} {amount:.4g}" for c, amount in facts["sparsity"].items())]
        if facts["pattern"] != "row":
            words = [*([] if each else words), facts["pattern"]]
        words.append(describe(self.prune))
        words += [facts["policy"]] if facts["policy"] != "uniform" else []
        words += [f"{facts['tokens']} tokens"] if facts["tokens"] != "all" else []
        words += [f"+ {facts['restore'].get('adapter', 'sparselora')}"] if facts["restore"] is not None else []
        return ", ".join(words).replace(", + ", " + ")

    @property
    def id(self) -> str:
        """A name for files: the label, the seed, and a hash of everything."""
        if not self.prune:
            return DENSE
        words = "".join(c if c.isalnum() or c in ".-" else "-" for c in self.label.replace("%", "").replace(":", "-"))
        return f"{'-'.join(filter(None, words.split('-')))[:60]}-s{self.seed}-{digest(self.facts)}"

    @property
    def pruning_id(self) -> str:
        """A hash of the pruning alone: cells that differ only in their restoration share it."""
        return digest({**self.facts, "restore": None})

    @property
    def pruning(self) -> PruneSpec:
        """The settings of pruning, for a cell that prunes."""
        assert self.prune is not None
        return self.prune

    def composition(self) -> Composition:
        """The way of pruning, for a cell that prunes."""
        return compose_spec(self.pruning)


def digest(facts: Any) -> str:
    """A short hash of plain values."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=4).hexdigest()


def cells(recipe: Mapping[str, Any]) -> list[Cell]:
    """Every cell of a recipe, the dense model first; equal cells are one.

    **Raises** `SparsightError` before anything is run for an empty grid, an unknown name, an invalid sparsity or seed, and
    for settings that contradict each other.
    """
    grids = recipe.get("grid")
    grids = [grids] if isinstance(grids, Mapping) else grids
    if not isinstance(grids, Sequence) or isinstance(grids, str) or not grids:
        raise SparsightError("grid: there is nothing to sweep; give lists, as in grid: {sparsity: [0.5, 0.6]}")
    if "seed" in (recipe.get("prune") or {}):
        raise SparsightError("prune.seed: a sweep takes its seeds from `seeds`, as in seeds: [0, 1, 2]")
    seeds = recipe.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds:
        raise SparsightError(f"seeds: {seeds!r} is not a list of seeds, as in [0, 1, 2]")
    for seed in seeds:
        PruneSpec.of({"seed": seed})
    by_id = {DENSE: Cell()}
    for grid in grids:
        for settings in _product(grid):
            restoration = settings.pop("restore", recipe.get("restore"))
            if restoration is not None:
                check_section("grid: restore", "restore", restoration)
                check_restore(spec_of(recipe, "restore", restoration))
            section = {"propagate": DEFAULT_PROPAGATE, **(recipe.get("prune") or {}), **settings}
            PruneSpec.of({key: settings[key] for key in settings}, where="grid")
            spec = spec_of(recipe, "prune", section)
            for seed in seeds:
                cell = Cell(replace(spec, seed=seed), restoration)
                cell.composition()
                find_policy(cell.policy)
                by_id[cell.id] = cell
    return list(by_id.values())


def _product(grid: Any) -> list[dict[str, Any]]:
    if not isinstance(grid, Mapping) or not grid:
        raise SparsightError(f"grid: {grid!r} is not a mapping of lists, as in {{sparsity: [0.5, 0.6]}}")
    lists = {}
    for axis, values in grid.items():
        if axis not in AXES:
            raise SparsightError(f"grid: unknown axis {axis!r}; {nearest(str(axis), AXES)}")
        lists[axis] = _sparsities(values) if axis == "sparsity" else values if isinstance(values, list) else [values]
        if not lists[axis]:
            raise SparsightError(f"grid: {axis} is an empty list; give at least one value, or leave it out")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _sparsities(values: Any) -> list[Any]:
    """The sparsities, with the two short forms `{sum, COMPONENT: [...]}` and `{alone, at: [...]}` written out."""
    entries = values if isinstance(values, list) else [values]
    written: list[Any] = []
    for entry in entries:
        if isinstance(entry, Mapping) and "sum" in entry:
            written += _fixed_sum(entry)
        elif isinstance(entry, Mapping) and "alone" in entry:
            component = check_name_of("component", "grid.alone", str(entry["alone"]), COMPONENTS)
            written += [{component: amount} for amount in _numbers(entry, "at") if amount]  # 0 is the dense model
        else:
            written.append(entry)
    return written


def _fixed_sum(entry: Mapping[str, Any]) -> list[dict[str, float]]:
    names = [name for name in entry if name != "sum"]
    if len(names) != 1 or names[0] not in ("vision", "language"):
        raise SparsightError(f"grid: {dict(entry)} needs one list beside `sum`, as in {{sum: 1.0, vision: [0.3, 0.5, 0.7]}}")
    name, other = names[0], {"vision": "language", "language": "vision"}[names[0]]
    total = _number(entry["sum"], "sum")
    splits = []
    for amount in _numbers(entry, name):
        split = {name: amount, other: round(total - amount, 10)}
        if not 0 <= split[other] < 1:
            raise SparsightError(
                f"grid: {name}={amount:g} leaves {other}={split[other]:g} of a sum of {total:g}; 0 to below 1"
            )
        splits.append({component: split[component] for component in ("vision", "language")})
    return splits


def _numbers(entry: Mapping[str, Any], key: str) -> list[float]:
    values = entry.get(key)
    if not isinstance(values, list) or not values:
        raise SparsightError(f"grid: {key} of {dict(entry)} is not a list of sparsities, as in [0.3, 0.5, 0.7]")
    return [_number(value, key) for value in values]


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SparsightError(f"grid: {key}: {value!r} is not a number")
    return float(value)
