"""The best split of one budget: where do the zeros do least harm?

Plans are compared by what they do to the model's answers: the divergence KL(pruned || dense) of the next token, mean over
the answer tokens of all calibration samples, with the very method that will prune. That costs forward passes and no
generation, and sees how components harm each other, which harms measured one by one do not. (On 32 samples, or the other
way round, the least divergence was found at splits that held-out answers do not bear out: docs/LOG.md.)

1. Between components: golden-section search along the line on which the number of zeros is the same.
2. Between blocks: the sensitivities of single blocks (`plan/sensitivity.py`) say where to go from there; how far is tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsight.errors import SparsightError
from sparsight.evaluate import Result
from sparsight.plan.pattern import Pattern
from sparsight.plan.plan import POLICIES, Plan, make_plan, planned_budget
from sparsight.plan.policy import size
from sparsight.plan.share import settle
from sparsight.sweep.grid import Cell
from sparsight.sweep.workbench import Workbench

GOLDEN = (math.sqrt(5) - 1) / 2
HIGHEST = 0.95  # of one component
COARSE, FINE = 5, 4  # points on the line, and steps of the golden section between the best's neighbours
TOWARDS = (0.25, 0.5, 0.75, 1.0)  # from the best split to what single blocks say

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tried:
    """A plan that was measured: what it is, its sparsity per component, its divergence in nats per answer token."""

    name: str
    components: Mapping[str, float]
    divergence: float
    plan: Plan

    @property
    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "components": dict(self.components), "divergence": self.divergence}


class Splits:
    """`cell` says how to prune; its sparsity is the split to begin from, and sets the budget."""

    def __init__(self, bench: Workbench, cell: Cell, progress: Progress | None = None) -> None:
        self.bench, self.cell = bench, cell
        self.pattern, self.start = planned_budget(cell.prune["pattern"], cell.prune["sparsity"], None)
        if self.pattern.kind == "n:m":
            raise SparsightError(
                f"--pattern: {self.pattern} has one sparsity only, so there is no split to search; use row or tensor, or "
                "`prune` with --policy sensitivity, which leaves layers dense"
            )
        if (most := max(self.start.values())) > HIGHEST:
            raise SparsightError(f"--sparsity: {most:g} leaves no room to move zeros; search knows at most {HIGHEST}")
        bench.plan(cell, measured=False)
        planned = make_plan(bench.body, sparsity=dict.fromkeys(self._named, 0.5), ignore=cell.prune["ignore"])
        self.layers = [layer for layer in bench.body.layers if layer.name in planned]
        self.sizes = {c: sum(size(x) for x in self.layers if x.component == c) for c in self._named}
        if missing := [c for c, count in self.sizes.items() if not count]:
            raise SparsightError(f"--sparsity: {missing[0]} has no layer that can be pruned")
        self.tried: list[Tried] = []
        self.measurements = 0
        self.progress = progress

    @property
    def _named(self) -> list[str]:
        return [component for component, amount in self.start.items() if amount]

    @property
    def budget(self) -> float:
        """The mean sparsity over all layers of the components named."""
        return sum(self.start[c] * n for c, n in self.sizes.items()) / sum(self.sizes.values())

    def best(self, blocks: bool = True) -> Tried:
        """The plan of least divergence; everything measured on the way is in `tried`."""
        found = given = self.split(self.start, "given")
        for a, b in [*itertools.combinations(self.sizes, 2)] * (1 if len(self.sizes) < 3 else 2):
            found = min(found, self._line(found, a, b), key=lambda t: t.divergence)
        if blocks:
            found = min([found, *self._blocks(found)], key=lambda t: t.divergence)
        return found if found.divergence < given.divergence else given

    def split(self, amounts: Mapping[str, float], name: str = "") -> Tried:
        """Measure a sparsity per component, the same in all its layers."""
        return self._try({x.name: amounts[x.component] for x in self.layers}, name or _percent(amounts, self.sizes))

    def _line(self, start: Tried, a: str, b: str) -> Tried:
        """Move zeros between two components, all others as in `start`."""
        zeros = sum(start.components[c] * self.sizes[c] for c in (a, b))

        def at(x: float) -> Tried:
            return self.split({**start.components, a: x, b: (zeros - x * self.sizes[a]) / self.sizes[b]})

        low = max(0.0, (zeros - HIGHEST * self.sizes[b]) / self.sizes[a])
        high = min(HIGHEST, zeros / self.sizes[a])
        points = [low + (high - low) * (i + 0.5) / COARSE for i in range(COARSE)]
        points = sorted({*points, min(max(start.components[a], low), high)})
        found = {x: at(x).divergence for x in points}
        best = min(found, key=lambda x: found[x])
        place = points.index(best)
        left, right = points[place - 1] if place else low, points[place + 1] if place + 1 < len(points) else high
        for _ in range(FINE):
            inner, outer = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
            if at(inner).divergence <= at(outer).divergence:
                right = outer
            else:
                left = inner
        return min(self.tried, key=lambda t: t.divergence)

    def _blocks(self, start: Tried) -> list[Tried]:
        """Go from a split towards what the blocks' sensitivities say, at the same budget."""
        policy = POLICIES["sensitivity"]
        budget = dict.fromkeys(self.sizes, self.budget)
        measure = self.bench.calibration(self.cell).measure
        if self.progress:
            measure.progress = self.progress
        single = policy(self.layers, budget, measure, self.pattern)
        here = {x.name: start.components[x.component] for x in self.layers}
        return [
            self._try(
                {name: (1 - part) * here[name] + part * single[name] for name in here}, f"blocks, {part:.0%} of the way"
            )
            for part in TOWARDS
        ]

    def _try(self, wanted: Mapping[str, float], name: str) -> Tried:
        """Round to the budget, prune, measure, undo; measured once."""
        shapes = {x.name: x.shape for x in self.layers}
        settled = settle(wanted, shapes, self.budget, pattern=self.pattern)
        plan = {n: Pattern(self.pattern.kind, amount) for n, amount in settled.sparsity.items() if amount}
        for known in self.tried:
            if known.plan == plan:
                return known
        divergence = self.divergence(plan)
        tried = Tried(name, self.components(plan), divergence, plan)
        self.tried.append(tried)
        if self.progress:
            self.progress(f"{name}: {divergence:.4f} nats", len(self.tried), len(self.tried) + 1)
        return tried

    def components(self, plan: Plan) -> dict[str, float]:
        zeros = dict.fromkeys(self.sizes, 0)
        for layer in self.layers:
            zeros[layer.component] += plan[layer.name].zeros(layer.shape) if layer.name in plan else 0
        return {component: zeros[component] / self.sizes[component] for component in zeros}

    def divergence(self, plan: Plan) -> float:
        """What pruning by `plan` does to the answers, in nats per answer token."""
        measure = self.bench.calibration(self.cell).measure
        measure.dense_answers()  # before anything is pruned
        self.measurements += 1
        try:
            self.bench.prune(self.cell, plan)
            return measure.drift()
        finally:
            self.bench.undo()

    def answers(self, tried: Tried | None = None) -> Result:
        """Score a plan's answers to the held-out samples; the dense model's without one."""
        try:
            if tried is not None:
                self.bench.prune(self.cell, tried.plan)
            return self.bench.score()
        finally:
            self.bench.undo()


def sparsest(
    bench: Workbench, cell: Cell, least: float, value: Callable[[Result], float], *, blocks: bool = True,
    step: float = 0.02, progress: Progress | None = None,
) -> tuple[Splits, Tried, Result, list[dict[str, Any]]]:  # fmt: skip
    """The sparsest plan whose held-out score is at least `least`, to `step` of sparsity.

    Bisection over budgets of the shape of the cell's split; every budget gets the best plan by divergence and one
    evaluation. **Raises** `SparsightError` if no budget of at least `step` will do.
    """
    _, shape = planned_budget(cell.prune["pattern"], cell.prune["sparsity"], None)
    most = HIGHEST / max(shape.values())
    low, high, found, steps = 0.0, most, None, []
    while high - low > step / max(shape.values()):
        factor = (low + high) / 2
        asked = {component: amount * factor for component, amount in shape.items() if amount}
        splits = Splits(bench, replace(cell, prune={**cell.prune, "sparsity": asked}), progress)
        tried = splits.best(blocks)
        result = splits.answers(tried)
        fits = value(result) >= least
        cost = {"measurements": splits.measurements}
        steps.append({"budget": splits.budget, **tried.facts, "score": value(result), "fits": fits, **cost})
        if fits:
            low, found = factor, (splits, tried, result)
        else:
            high = factor
    if found is None:
        raise SparsightError(f"--within: no plan of this shape keeps a score of {least:.4f}; allow more")
    return (*found, steps)


def _percent(amounts: Mapping[str, float], components: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"{component} {amounts[component]:.1%}" for component in components)
