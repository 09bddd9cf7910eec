"""One solver for every policy: importance, sizes and a budget in, a sparsity per layer out.

A scale is a monotone rule with one unknown, the level, found by bisection so that the mean over all weights is the budget:

    shift         sparsity = level - importance            OWL: offsets around the budget
    proportional  density  = (1 - cap) + c importance      ECoFLaP: kept weights in proportion to importance
    inverse       sparsity = c / importance                AlphaPruning: ratios of sparsities
    curves        sparsity as far as one more zero costs at most the level     measured divergences

each within a floor and a cap. The sparsities are then rounded to what a pattern can hold, one zero more in every row (`row`)
or in the matrix (`tensor`), so that the total is met within `TOLERANCE` if any whole numbers meet it. n:m has one sparsity
only, so there the solver chooses the layers that stay dense. Both are the same exact knapsack.

Published codes meet the budget for layers of one size only (OWL: an unweighted mean), or miss it (ECoFLaP adds weights
instead of removing them); here the mean counts weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsight.errors import SparsightError
from sparsight.masks.pattern import Pattern

Scale = Literal["shift", "proportional", "inverse", "curves"]
Curve = Sequence[tuple[float, float]]  # (sparsity, cost per weight), by rising sparsity; (0, 0) is implied
Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

MOST = 0.99  # no layer gets a higher sparsity, whatever its importance
TOLERANCE = 1e-4
CELLS = 2**27  # of the knapsack's table; beyond it sizes are rounded


@dataclass(frozen=True)
class Allocation:
    """A sparsity per layer, and their mean over all weights as `reached` in whole numbers of zeros."""

    sparsity: dict[str, float]
    reached: float


def allocate(
    importance: Mapping[str, float] | Mapping[str, Curve],
    shapes: Mapping[str, tuple[int, int]],
    budget: float,
    *,
    pattern: Pattern,
    scale: Scale = "shift",
    floor: float = 0.0,
    cap: float = MOST,
) -> Allocation:
    """Allocate `budget`, the mean sparsity over the weights of all layers, by their importance per weight.

    Of `pattern` only the kind counts, and n:m. `pattern.zeros(shape)` at the sparsities returned meets the budget.

    **Raises** `SparsightError` for a budget that no plan within `floor` and `cap` meets, with the range that is met.
    """
    names = list(importance)
    shape = np.array([shapes[name] for name in names], dtype=np.int64)
    size = shape.prod(1)
    if pattern.kind == "n:m":
        _check_reach(budget, 0.0, pattern.sparsity, len(names), str(pattern))
        worth = _finite([_cost(importance[name], pattern.sparsity) for name in names])
        dense = knapsack(size, worth * size, (1 - budget / pattern.sparsity) * size.sum())
        sparsity = np.where(dense, 0.0, pattern.sparsity)
        return Allocation(dict(zip(names, sparsity.tolist(), strict=True)), float(sparsity @ size / size.sum()))
    units = size // _weight(shape, pattern)
    low, high = np.ceil(floor * units - 1e-9), np.floor(cap * units + 1e-9)
    least, most = (float(bound @ _weight(shape, pattern) / size.sum()) for bound in (low, high))
    _check_reach(budget, least, most, len(names), f"{floor:g} to {cap:g}")
    if scale == "curves":
        _finite([_cost(importance[name], budget) for name in names])
        sparsities = greedy_fill([hull(importance[name]) for name in names], size, budget, low / units, high / units)  # type: ignore[arg-type]
    else:
        values = _finite([importance[name] for name in names])
        sparsities = solve_level(values, size, budget, low / units, high / units, scale, cap)
    return round_to_budget(
        dict(zip(names, sparsities.tolist(), strict=True)), shapes, budget, pattern=pattern, floor=floor, cap=cap
    )


def round_to_budget(
    sparsity: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    budget: float,
    *,
    pattern: Pattern,
    floor: float = 0.0,
    cap: float = MOST,
) -> Allocation:
    """Round a sparsity per layer to what the pattern (`row` or `tensor`) can hold, so that their mean is `budget`."""
    shape = np.array([shapes[name] for name in sparsity], dtype=np.int64)
    weight, size = _weight(shape, pattern), shape.prod(1)
    units, total = size // weight, float(size.sum())
    low, high = (np.ceil(floor * units - 1e-9).astype(np.int64), np.floor(cap * units + 1e-9).astype(np.int64))
    real = np.array(list(sparsity.values()), dtype=np.float64)
    solved = round_units(real * units, low, high, weight, budget * total, slack=TOLERANCE * total)
    return Allocation(dict(zip(sparsity, (solved / units).tolist(), strict=True)), float(solved @ weight / total))


def _weight(shape: Whole, pattern: Pattern) -> Whole:
    """Return the number of zeros in one unit of a layer: one in every row, or one."""
    return shape[:, 0] if pattern.kind == "row" else np.ones(len(shape), dtype=np.int64)


def _check_reach(budget: float, low: float, high: float, layers: int, each: str) -> None:
    if not low - TOLERANCE <= budget <= high + TOLERANCE:
        raise SparsightError(
            f"`sparsity`: a mean of {budget:.4g} over {layers} layers is out of reach at {each} each; "
            f"they reach {low:.4g} to {high:.4g}; ask for that, or choose another `policy`"
        )


def _finite(importance: Sequence[Any]) -> Floats:
    values = np.array(importance, dtype=np.float64)
    if not np.isfinite(values).all():
        raise SparsightError(
            "`policy`: what a layer is worth is not a finite number; look for NaN or infinity in weights and samples"
        )
    return values


def solve_level(
    importance: Floats, size: Whole, budget: float, low: Floats, high: Floats, scale: Scale, cap: float = MOST
) -> Floats:
    """Solve a scale by bisection: real-valued sparsities, between `low` and `high`, whose mean over weights is `budget`.

    **Raises** `ValueError` for negative importances, except on the scale `shift`.
    """
    if scale == "shift":
        offset, slope = -importance, np.ones_like(importance)
    else:
        if (importance < 0).any():
            raise ValueError(f"the scale {scale!r} needs importances of at least 0")
        worth = np.maximum(importance / importance.max(), 1e-9) if importance.any() else np.ones_like(importance)
        offset, slope = (np.full_like(worth, cap), worth) if scale == "proportional" else (0 * worth, 1 / worth)
    bottom, top = ((low - offset) / slope).min(), ((high - offset) / slope).max()
    for _ in range(200):
        middle = (bottom + top) / 2
        if np.clip(offset + middle * slope, low, high) @ size < budget * size.sum():
            bottom = middle
        else:
            top = middle
    return np.clip(offset + top * slope, low, high)


def hull(curve: Curve) -> list[tuple[float, float]]:
    """Return the lower convex hull of a measured curve, from (0, 0) on: the cost of mixing two levels."""
    points: list[tuple[float, float]] = []
    for x, y in [(0.0, 0.0), *sorted(curve)]:
        if points and x <= points[-1][0]:
            continue
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], (x, y)):
            points.pop()
        points.append((x, y))
    return points


def greedy_fill(curves: Sequence[Curve], size: Whole, budget: float, low: Floats, high: Floats) -> Floats:
    """Minimise the sum of convex piecewise linear costs under the budget, exactly: the cheapest zeros first.

    Pieces of the same slope are filled alike, so that the layers of one block stay together.
    """
    sparsity, rest = low.copy(), budget * size.sum() - low @ size
    pieces: dict[float, list[tuple[int, float, float]]] = {}
    for i, curve in enumerate(curves):
        ends = [*curve, (1.0, math.inf)]  # beyond the last measurement only if nothing else is left
        for here, there in itertools.pairwise(ends):
            start, end = max(here[0], low[i]), min(there[0], high[i])
            if end > start:
                pieces.setdefault(_slope(here, there), []).append((i, start, end))
    for slope in sorted(pieces):
        room = sum((end - start) * size[i] for i, start, end in pieces[slope])
        part = min(1.0, max(0.0, rest / room))
        for i, start, end in pieces[slope]:
            sparsity[i] += part * (end - start)
        rest -= part * room
    return sparsity


def round_units(units: Floats, low: Whole, high: Whole, weight: Whole, target: float, slack: float) -> Whole:
    """Round to whole numbers between `low` and `high` so that their sum, each times `weight`, is nearest to `target`.

    Each rounds to one of its two neighbours, and further only if that misses the total by more than `slack`. Of several
    equally near solutions, the one nearest to `units` is returned.
    """
    base = np.clip(np.floor(units + 1e-6), low, high).astype(np.int64)
    enough = max(slack, int(np.gcd.reduce(weight)) / 2)
    reach = 0
    while True:
        bottom, top = np.maximum(base - reach, low), np.minimum(base + 1 + reach, high)
        item = np.repeat(np.arange(len(base)), top - bottom)  # one item is one more zero unit of one layer
        before = np.concatenate([np.arange(a, b) for a, b in zip(bottom, top, strict=True)])
        gain = np.abs(before - units[item]) - np.abs(before + 1 - units[item])
        picks = knapsack(weight[item], gain, target - float(bottom @ weight))
        solved = bottom + np.bincount(item[picks], minlength=len(base))
        if abs(solved @ weight - target) <= enough or ((bottom == low).all() and (top == high).all()):
            return solved
        reach = 2 * reach + 1


def knapsack(size: Whole, value: Floats, target: float) -> NDArray[np.bool_]:
    """Choose items whose sizes add up as near to `target` as any choice can; of such choices the most valuable.

    Exact dynamic programming over sizes in units of their common divisor; where that table would exceed `CELLS`, over
    rounded sizes.
    """
    picks = np.zeros(len(size), dtype=bool)
    if len(size) == 0 or target <= 0:
        return picks
    unit = int(np.gcd.reduce(size))
    top = min(int(size.sum()), int(target) + int(size.max()) + 1)
    unit *= max(1, math.ceil(top // unit * len(size) / CELLS))
    steps = np.maximum(1, (size + unit // 2) // unit)
    best = np.full(min(int(steps.sum()), top // unit + 1) + 1, -np.inf)
    best[0] = 0.0
    history = []
    for step, worth in zip(steps.tolist(), value.tolist(), strict=True):
        with_it = best[: max(0, len(best) - step)] + worth
        better = np.zeros(len(best), dtype=bool)
        better[step:] = with_it > best[step:]
        best[step:] = np.maximum(with_it, best[step:])
        history.append(np.packbits(better))
    sums = np.flatnonzero(np.isfinite(best))
    away = np.abs(sums * unit - target)
    nearest = sums[away == away.min()]
    at = int(nearest[np.argmax(best[nearest])])
    for i in reversed(range(len(size))):
        if np.unpackbits(history[i], count=len(best))[at]:
            picks[i] = True
            at -= int(steps[i])
    return picks


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _cost(importance: float | Curve, sparsity: float) -> float:
    """Return the importance of a weight: the number itself, or its curve's value at `sparsity`."""
    if isinstance(importance, Sequence):
        points = hull(importance)
        return float(np.interp(sparsity, [x for x, _ in points], [y for _, y in points]))
    return float(importance)
