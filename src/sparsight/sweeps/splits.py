"""The best split of one budget: where do the zeros do least harm?

Plans are compared by the divergence KL(pruned || dense) of the next token, mean over the answer tokens of all calibration
samples, with the same method as the final pruning. This costs forward passes and no generation, and it measures what
components do together, not one by one. (With 32 samples, or with KL(dense || pruned), the least divergence was at splits
with worse held-out answers: docs/LOG.md.)

1. Between components: golden-section search along the line on which the number of zeros is the same.
2. Between blocks: the sensitivities of single blocks (the policy `sensitivity`) give the direction from there; a few
   distances are tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsight.allocation.plan import POLICIES, Plan, check_plan, make_plan, planned_budget
from sparsight.allocation.policy import size
from sparsight.allocation.solver import round_to_budget
from sparsight.errors import SparsightError
from sparsight.evaluation import Result
from sparsight.masks.pattern import Pattern
from sparsight.progress import Progress
from sparsight.sweeps.grid import Cell
from sparsight.sweeps.workbench import Workbench

GOLDEN = (math.sqrt(5) - 1) / 2
HIGHEST = 0.95  # of one component
COARSE, FINE = 5, 4  # points on the line, and steps of the golden section between the best's neighbours
TOWARDS = (0.25, 0.5, 0.75, 1.0)  # of the way from the best split to the sensitivities of single blocks


@dataclass(frozen=True)
class Candidate:
    """A measured plan: its sparsity per component, and its divergence in nats per answer token."""

    name: str
    components: Mapping[str, float]
    divergence: float
    plan: Plan

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values, without the plan."""
        return {"name": self.name, "components": dict(self.components), "divergence": self.divergence}


class Splits:
    """The search for the best split; `cell` has the method, and its sparsity is the starting split and the budget."""

    def __init__(self, bench: Workbench, cell: Cell, progress: Progress | None = None) -> None:
        self.bench, self.cell = bench, cell
        patterns, self.start = planned_budget(cell.pruning.pattern, cell.pruning.sparsity)
        self.pattern, *others = {patterns[c]: c for c, amount in self.start.items() if amount}
        if others:
            raise SparsightError("`pattern`: differs between components, which zeros are moved between; give one pattern")
        if self.pattern.kind == "n:m":
            raise SparsightError(
                f"`pattern`: {self.pattern} has one sparsity only, so there is no split to search; use row or tensor, or "
                "`prune` with `policy=sensitivity`, which leaves layers dense"
            )
        if (most := max(self.start.values())) > HIGHEST:
            raise SparsightError(f"`sparsity`: {most:g} leaves no room to move zeros; search takes at most {HIGHEST}")
        check_plan(bench.body, cell.pruning, cell.policy)
        planned = make_plan(bench.body, sparsity=dict.fromkeys(self._components, 0.5), ignore=cell.pruning.ignore)
        self.layers = [layer for layer in bench.body.layers if layer.name in planned]
        self.sizes = {c: sum(size(x) for x in self.layers if x.component == c) for c in self._components}
        if missing := [c for c, count in self.sizes.items() if not count]:
            raise SparsightError(f"`sparsity`: {missing[0]} has no layer that can be pruned")
        self.candidates: list[Candidate] = []
        self.measurements = 0
        self.progress = progress

    @property
    def _components(self) -> list[str]:
        return [component for component, amount in self.start.items() if amount]

    @property
    def budget(self) -> float:
        """The mean sparsity over all layers of the components named."""
        return sum(self.start[c] * n for c, n in self.sizes.items()) / sum(self.sizes.values())

    def best(self, blocks: bool = True) -> Candidate:
        """The plan of least divergence; all measured plans are in `candidates`."""
        best = first = self.split(self.start, "given")
        for a, b in [*itertools.combinations(self.sizes, 2)] * (1 if len(self.sizes) < 3 else 2):
            best = min(best, self._line(best, a, b), key=lambda t: t.divergence)
        if blocks:
            best = min([best, *self._blocks(best)], key=lambda t: t.divergence)
        return best if best.divergence < first.divergence else first

    def split(self, amounts: Mapping[str, float], name: str = "") -> Candidate:
        """Measure a sparsity per component, the same in all its layers."""
        return self._try({x.name: amounts[x.component] for x in self.layers}, name or _percent(amounts, self.sizes))

    def _line(self, start: Candidate, a: str, b: str) -> Candidate:
        """Move zeros between two components, all others as in `start`."""
        zeros = sum(start.components[c] * self.sizes[c] for c in (a, b))

        def at(x: float) -> Candidate:
            return self.split({**start.components, a: x, b: (zeros - x * self.sizes[a]) / self.sizes[b]})

        low = max(0.0, (zeros - HIGHEST * self.sizes[b]) / self.sizes[a])
        high = min(HIGHEST, zeros / self.sizes[a])
        points = [low + (high - low) * (i + 0.5) / COARSE for i in range(COARSE)]
        points = sorted({*points, min(max(start.components[a], low), high)})
        divergences = {x: at(x).divergence for x in points}
        best = min(divergences, key=lambda x: divergences[x])
        place = points.index(best)
        left, right = points[place - 1] if place else low, points[place + 1] if place + 1 < len(points) else high
        for _ in range(FINE):
            inner, outer = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
            if at(inner).divergence <= at(outer).divergence:
                right = outer
            else:
                left = inner
        return min(self.candidates, key=lambda t: t.divergence)

    def _blocks(self, start: Candidate) -> list[Candidate]:
        """Measure plans between a split and the blocks' sensitivities, at the same budget."""
        policy = POLICIES["sensitivity"]
        budget = dict.fromkeys(self.sizes, self.budget)
        probe = self.bench.calibration(self.cell).probe
        if self.progress:
            probe.progress = self.progress
        single = policy(self.layers, budget, probe, self.pattern)
        here = {x.name: start.components[x.component] for x in self.layers}
        return [
            self._try(
                {name: (1 - part) * here[name] + part * single[name] for name in here}, f"blocks, {part:.0%} of the way"
            )
            for part in TOWARDS
        ]

    def _try(self, sparsity: Mapping[str, float], name: str) -> Candidate:
        """Round to the budget, prune, measure, undo; equal plans are measured once."""
        shapes = {x.name: x.shape for x in self.layers}
        rounded = round_to_budget(sparsity, shapes, self.budget, pattern=self.pattern)
        plan = {n: Pattern(self.pattern.kind, amount) for n, amount in rounded.sparsity.items() if amount}
        for other in self.candidates:
            if other.plan == plan:
                return other
        divergence = self.divergence(plan)
        candidate = Candidate(name, self.components(plan), divergence, plan)
        self.candidates.append(candidate)
        if self.progress:
            self.progress(f"{name}: {divergence:.4f} nats", len(self.candidates), len(self.candidates) + 1)
        return candidate

    def components(self, plan: Plan) -> dict[str, float]:
        """The sparsity of a plan, per component."""
        zeros = dict.fromkeys(self.sizes, 0)
        for layer in self.layers:
            zeros[layer.component] += plan[layer.name].zeros(layer.shape) if layer.name in plan else 0
        return {component: zeros[component] / self.sizes[component] for component in zeros}

    def divergence(self, plan: Plan) -> float:
        """The divergence of pruning by `plan`, in nats per answer token."""
        probe = self.bench.calibration(self.cell).probe
        probe.dense_answers()  # before anything is pruned
        self.measurements += 1
        try:
            self.bench.prune(self.cell, plan)
            return probe.drift()
        finally:
            self.bench.undo()

    def answers(self, candidate: Candidate | None = None) -> Result:
        """Score a plan's answers to the held-out samples; the dense model's without one."""
        try:
            if candidate is not None:
                self.bench.prune(self.cell, candidate.plan)
            return self.bench.score()
        finally:
            self.bench.undo()


def sparsest(
    bench: Workbench, cell: Cell, least: float, value: Callable[[Result], float], *, blocks: bool = True,
    step: float = 0.02, progress: Progress | None = None,
) -> tuple[Splits, Candidate, Result, list[dict[str, Any]]]:  # fmt: skip
    """The sparsest plan whose held-out score is at least `least`, to `step` of sparsity.

    Bisection over budgets of the shape of the cell's split; every budget gets the best plan by divergence and one
    evaluation. **Raises** `SparsightError` if no budget of at least `step` reaches it.
    """
    _, shape = planned_budget(cell.pruning.pattern, cell.pruning.sparsity)
    most = HIGHEST / max(shape.values())
    low, high, best, steps = 0.0, most, None, []
    while high - low > step / max(shape.values()):
        factor = (low + high) / 2
        amounts = {component: amount * factor for component, amount in shape.items() if amount}
        splits = Splits(bench, replace(cell, prune=replace(cell.pruning, sparsity=amounts)), progress)
        candidate = splits.best(blocks)
        result = splits.answers(candidate)
        fits = value(result) >= least
        cost = {"measurements": splits.measurements}
        steps.append({"budget": splits.budget, **candidate.facts, "score": value(result), "fits": fits, **cost})
        if fits:
            low, best = factor, (splits, candidate, result)
        else:
            high = factor
    if best is None:
        raise SparsightError(f"`within`: no plan of this shape keeps a score of {least:.4f}; allow more")
    return (*best, steps)


def _percent(amounts: Mapping[str, float], components: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"{component} {amounts[component]:.1%}" for component in components)
