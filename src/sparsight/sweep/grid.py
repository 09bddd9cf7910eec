"""From the lists of a recipe to cells: every combination of what is varied, each with a name of its own.

    seeds: [0, 1, 2]
    prune: {propagate: dense}          # what all cells share
    grid:                              # one product of lists, or several
      - sparsity: {sum: 1.0, vision: [0.1, 0.3, 0.5, 0.7]}       # the rest of the sum for language
      - sparsity: [{alone: vision, at: [0.3, 0.5]}, {alone: language, at: [0.3, 0.5]}]
      - pattern: ["2:4", "4:8"]
        restore: [null, {steps: 100, lr: 1e-3}]

What varies are keywords of `prune`, and `restore`, a section or null. The dense model is always a cell.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsight.errors import SparsightError
from sparsight.plan.budget import check_component, nearest
from sparsight.plan.pattern import Pattern
from sparsight.plan.plan import find_policy, planned_budget
from sparsight.prune.choice import Choice, choose, named, preset_policy
from sparsight.recipe import check_kind, check_section
from sparsight.restore.run import check_keywords
from sparsight.settings import check_seed, check_whole, parse_list

DENSE = "dense"
AXES = (
    "sparsity", "pattern", "method", "refine", "update", "reconstruct", "permute", "tokens", "policy", "ignore",
    "propagate", "samples", "restore",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "sparsity": None, "pattern": "row", "method": "wanda", "refine": None, "update": None, "reconstruct": 0,
    "permute": False, "tokens": "all", "policy": None, "ignore": (), "propagate": "dense", "samples": 128, "batch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One result: how to prune, how to restore (None: not at all), and the seed of both. No `prune`: the dense model."""

    prune: Mapping[str, Any] = field(default_factory=dict)
    restore: Mapping[str, Any] | None = None
    seed: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as plain values; what is pruned per component stands in `sparsity`, whatever the pattern."""
        if not self.prune:
            return {**dict.fromkeys(DEFAULTS), "sparsity": {}, "restore": None, "seed": None}
        _, budget = planned_budget(self.prune["pattern"], self.prune["sparsity"], self.policy)
        return {
            **self.prune,
            "ignore": list(self.prune["ignore"]),
            "policy": self.policy,
            "sparsity": {component: amount for component, amount in budget.items() if amount},
            "restore": None if self.restore is None else dict(self.restore),
            "seed": self.seed,
        }

    @property
    def policy(self) -> str:
        return preset_policy(self.prune["method"], self.prune["policy"])

    @property
    def named(self) -> str:
        """The way of pruning in words."""
        return named(*(self.prune[key] for key in ("method", "refine", "update", "reconstruct", "permute")))

    @property
    def label(self) -> str:
        """In words, without the seed."""
        if not self.prune:
            return DENSE
        facts = self.facts
        amounts = facts["sparsity"].values()
        each = (
            f"{100 * next(iter(amounts)):g}%"
            if set(facts["sparsity"]) == {"vision", "language"} and len(set(amounts)) == 1
            else ""
        )
        words = [each or " ".join(f"{c} {amount:.4g}" for c, amount in facts["sparsity"].items())]
        if facts["pattern"] != "row":
            words = [*([] if each else words), facts["pattern"]]
        words.append(self.named)
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
    def pruned(self) -> str:
        """What tells one pruning from another; cells that differ in their restoration only have the same."""
        return digest({**self.facts, "restore": None})

    def choice(self) -> Choice:
        return choose(
            self.prune["method"],
            **{key: self.prune[key] for key in ("refine", "update", "reconstruct", "permute", "tokens", "propagate")},
            pattern=Pattern.parse(self.prune["pattern"]),
        )


def digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=4).hexdigest()


def cells(recipe: Mapping[str, Any]) -> list[Cell]:
    """Every cell of a recipe, the dense model first; those that are asked for twice stand once.

    **Raises** `SparsightError` before anything is run for an empty grid, an unknown name, a sparsity or a seed that
    cannot be, and what makes no sense together.
    """
    shared = recipe.get("prune") or {}
    grids = recipe.get("grid")
    grids = [grids] if isinstance(grids, Mapping) else grids
    if not isinstance(grids, Sequence) or isinstance(grids, str) or not grids:
        raise SparsightError("grid: there is nothing to sweep; give lists, as in grid: {sparsity: [0.5, 0.6]}")
    if "seed" in shared:
        raise SparsightError("prune.seed: a sweep takes its seeds from `seeds`, as in seeds: [0, 1, 2]")
    seeds = recipe.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds:
        raise SparsightError(f"seeds: {seeds!r} is not a list of seeds, as in [0, 1, 2]")
    for seed in seeds:
        check_seed(seed)
    found = {DENSE: Cell()}
    for grid in grids:
        for varied in _product(grid):
            restoration = varied.pop("restore", recipe.get("restore"))
            if restoration is not None:
                check_section("grid: restore", "restore", restoration)
                check_keywords(restoration, recipe.get("device") or "cpu")
            settings = {**DEFAULTS, **shared, **varied}
            for name, value in settings.items():
                check_kind(f"grid: {name}", "prune", name, value)
            settings["ignore"] = parse_list(settings["ignore"] or ())
            check_whole("grid: samples", settings["samples"])
            for seed in seeds:
                cell = Cell(settings, restoration, seed)
                cell.choice()
                find_policy(cell.policy)
                found[cell.id] = cell
    return list(found.values())


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


def _sparsities(given: Any) -> list[Any]:
    """What `prune` takes, with the two short forms `{sum, COMPONENT: [...]}` and `{alone, at: [...]}` written out."""
    entries = given if isinstance(given, list) else [given]
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, Mapping) and "sum" in entry:
            found += _fixed_sum(entry)
        elif isinstance(entry, Mapping) and "alone" in entry:
            component = check_component(str(entry["alone"]), "grid: alone")
            found += [{component: amount} for amount in _numbers(entry, "at") if amount]  # 0 is the dense model
        else:
            found.append(entry)
    return found


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
