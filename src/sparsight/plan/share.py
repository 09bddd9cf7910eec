"""One solver for every policy: importance, sizes and a budget in, a sparsity per layer out.

A scale is a monotone rule with one unknown, the level, found by bisection so that the mean over all weights is the budget:

    shift         sparsity = level - importance            OWL: offsets around the budget
    proportional  density  = (1 - cap) + c importance      ECoFLaP: kept weights in proportion to what they are worth
    inverse       sparsity = c / importance                AlphaPruning: ratios of sparsities
    curves        sparsity as far as one more zero costs at most the level     measured divergences

each within a floor and a cap. What comes out is then rounded to what a pattern can hold, one zero more in every row
(`row`) or in the matrix (`tensor`), so that the total is met within `TOLERANCE` where any whole numbers meet it. n:m has
one sparsity only, so there the solver chooses which layers stay dense. Both are the same exact knapsack.

Published codes meet the budget for layers of one size only (OWL: an unweighted mean), or miss it (ECoFLaP adds weights
where it should take some away); here the mean counts weights.
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
from sparsight.plan.pattern import Pattern

Scale = Literal["shift", "proportional", "inverse", "curves"]
Curve = Sequence[tuple[float, float]]  # (sparsity, cost per weight), by rising sparsity; (0, 0) is understood
Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

MOST = 0.99  # no layer gets more zeros, whatever it is worth
TOLERANCE = 1e-4
CELLS = 2**27  # of the knapsack's table; beyond it sizes are rounded


@dataclass(frozen=True)
class Shared:
    """A sparsity per layer, and the mean over all their weights that whole numbers of zeros allow."""

    sparsity: dict[str, float]
    reached: float


def share(
    importance: Mapping[str, float] | Mapping[str, Curve],
    shapes: Mapping[str, tuple[int, int]],
    budget: float,
    *,
    pattern: Pattern,
    scale: Scale = "shift",
    floor: float = 0.0,
    cap: float = MOST,
) -> Shared:
    """Share `budget`, the mean sparsity over the weights of all layers, as their importance (per weight) says.

    Of `pattern` only the kind counts, and n:m. `pattern.zeros(shape)` at the sparsities returned is what was solved for.

    **Raises** `SparsightError` for a budget that no plan within `floor` and `cap` meets, naming those it could.
    """
    names = list(importance)
    shape = np.array([shapes[name] for name in names], dtype=np.int64)
    size = shape.prod(1)
    if pattern.kind == "n:m":
        _check_reach(budget, 0.0, pattern.sparsity, len(names), str(pattern))
        worth = _finite([_cost(importance[name], pattern.sparsity) for name in names])
        dense = subset(size, worth * size, (1 - budget / pattern.sparsity) * size.sum())
        sparsity = np.where(dense, 0.0, pattern.sparsity)
        return Shared(dict(zip(names, sparsity.tolist(), strict=True)), float(sparsity @ size / size.sum()))
    units = size // _weight(shape, pattern)
    low, high = np.ceil(floor * units - 1e-9), np.floor(cap * units + 1e-9)
    least, most = (float(bound @ _weight(shape, pattern) / size.sum()) for bound in (low, high))
    _check_reach(budget, least, most, len(names), f"{floor:g} to {cap:g}")
    if scale == "curves":
        _finite([_cost(importance[name], budget) for name in names])
        wanted = fill([hull(importance[name]) for name in names], size, budget, low / units, high / units)  # type: ignore[arg-type]
    else:
        given = _finite([importance[name] for name in names])
        wanted = level(given, size, budget, low / units, high / units, scale, cap)
    return settle(dict(zip(names, wanted.tolist(), strict=True)), shapes, budget, pattern=pattern, floor=floor, cap=cap)


def settle(
    wanted: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    budget: float,
    *,
    pattern: Pattern,
    floor: float = 0.0,
    cap: float = MOST,
) -> Shared:
    """Round a sparsity per layer to what the pattern (`row` or `tensor`) can hold, so that their mean is `budget`."""
    shape = np.array([shapes[name] for name in wanted], dtype=np.int64)
    weight, size = _weight(shape, pattern), shape.prod(1)
    units, total = size // weight, float(size.sum())
    low, high = (np.ceil(floor * units - 1e-9).astype(np.int64), np.floor(cap * units + 1e-9).astype(np.int64))
    given = np.array(list(wanted.values()), dtype=np.float64)
    solved = whole(given * units, low, high, weight, budget * total, slack=TOLERANCE * total)
    return Shared(dict(zip(wanted, (solved / units).tolist(), strict=True)), float(solved @ weight / total))


def _weight(shape: Whole, pattern: Pattern) -> Whole:
    """How many zeros one more unit of a layer is: one in every row, or one."""
    return shape[:, 0] if pattern.kind == "row" else np.ones(len(shape), dtype=np.int64)


def _check_reach(budget: float, low: float, high: float, layers: int, each: str) -> None:
    if not low - TOLERANCE <= budget <= high + TOLERANCE:
        raise SparsightError(
            f"--sparsity: a mean of {budget:.4g} over {layers} layers is out of reach at {each} each; "
            f"they reach {low:.4g} to {high:.4g}; ask for that, or choose another --policy"
        )


def _finite(importance: Sequence[Any]) -> Floats:
    values = np.array(importance, dtype=np.float64)
    if not np.isfinite(values).all():
        raise SparsightError(
            "--policy: what a layer is worth is not a finite number; look for NaN or infinity in weights and samples"
        )
    return values


def level(
    importance: Floats, size: Whole, budget: float, low: Floats, high: Floats, scale: Scale, cap: float = MOST
) -> Floats:
    """Solve a scale by bisection: real-valued sparsities, between `low` and `high`, whose mean over weights is `budget`."""
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
    """The lower convex hull of a measured curve, from (0, 0) on: what mixing two levels would cost."""
    points: list[tuple[float, float]] = []
    for x, y in [(0.0, 0.0), *sorted(curve)]:
        if points and x <= points[-1][0]:
            continue
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], (x, y)):
            points.pop()
        points.append((x, y))
    return points


def fill(curves: Sequence[Curve], size: Whole, budget: float, low: Floats, high: Floats) -> Floats:
    """Minimise the sum of convex piecewise linear costs under the budget: the cheapest zeros first, which is exact.

    Pieces of the same slope are filled alike, so that the layers of one block stay together.
    """
    sparsity, left = low.copy(), budget * size.sum() - low @ size
    pieces: dict[float, list[tuple[int, float, float]]] = {}
    for i, curve in enumerate(curves):
        ends = [*curve, (1.0, math.inf)]  # beyond what was measured only as the last resort
        for here, there in itertools.pairwise(ends):
            start, end = max(here[0], low[i]), min(there[0], high[i])
            if end > start:
                pieces.setdefault(_slope(here, there), []).append((i, start, end))
    for slope in sorted(pieces):
        room = sum((end - start) * size[i] for i, start, end in pieces[slope])
        part = min(1.0, max(0.0, left / room))
        for i, start, end in pieces[slope]:
            sparsity[i] += part * (end - start)
        left -= part * room
    return sparsity


def whole(wanted: Floats, low: Whole, high: Whole, weight: Whole, target: float, slack: float) -> Whole:
    """Round to whole numbers between `low` and `high` so that their sum, each times `weight`, is nearest to `target`.

    Each may go to one of its two neighbours, and further only if the total is missed by more than `slack` then. Of all
    that come equally near, the one nearest to `wanted` is taken.
    """
    base = np.clip(np.floor(wanted + 1e-6), low, high).astype(np.int64)
    enough = max(slack, int(np.gcd.reduce(weight)) / 2)
    reach = 0
    while True:
        bottom, top = np.maximum(base - reach, low), np.minimum(base + 1 + reach, high)
        item = np.repeat(np.arange(len(base)), top - bottom)  # one item is one more zero unit of one layer
        before = np.concatenate([np.arange(a, b) for a, b in zip(bottom, top, strict=True)])
        gain = np.abs(before - wanted[item]) - np.abs(before + 1 - wanted[item])
        chosen = subset(weight[item], gain, target - float(bottom @ weight))
        solved = bottom + np.bincount(item[chosen], minlength=len(base))
        if abs(solved @ weight - target) <= enough or ((bottom == low).all() and (top == high).all()):
            return solved
        reach = 2 * reach + 1


def subset(size: Whole, value: Floats, target: float) -> NDArray[np.bool_]:
    """Choose items whose sizes add up as near to `target` as any choice can, and of those the most valuable ones.

    Exact dynamic programming over sizes in units of their common divisor; where that table would exceed `CELLS`, over
    rounded sizes.
    """
    chosen = np.zeros(len(size), dtype=bool)
    if len(size) == 0 or target <= 0:
        return chosen
    unit = int(np.gcd.reduce(size))
    top = min(int(size.sum()), int(target) + int(size.max()) + 1)
    unit *= max(1, math.ceil(top // unit * len(size) / CELLS))
    steps = np.maximum(1, (size + unit // 2) // unit)
    best = np.full(min(int(steps.sum()), top // unit + 1) + 1, -np.inf)
    best[0] = 0.0
    taken = []
    for step, worth in zip(steps.tolist(), value.tolist(), strict=True):
        with_it = best[: max(0, len(best) - step)] + worth
        better = np.zeros(len(best), dtype=bool)
        better[step:] = with_it > best[step:]
        best[step:] = np.maximum(with_it, best[step:])
        taken.append(np.packbits(better))
    sums = np.flatnonzero(np.isfinite(best))
    away = np.abs(sums * unit - target)
    nearest = sums[away == away.min()]
    at = int(nearest[np.argmax(best[nearest])])
    for i in reversed(range(len(size))):
        if np.unpackbits(taken[i], count=len(best))[at]:
            chosen[i] = True
            at -= int(steps[i])
    return chosen


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _cost(importance: float | Curve, sparsity: float) -> float:
    """What a weight is worth: its importance, or what its curve says at `sparsity`."""
    if isinstance(importance, Sequence):
        points = hull(importance)
        return float(np.interp(sparsity, [x for x, _ in points], [y for _, y in points]))
    return float(importance)
