"""The solver: budgets are met in whole zeros, within floor and cap, and what is worth more keeps more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsight import Pattern, SparsightError
from sparsight.allocation import solver
from sparsight.allocation.solver import TOLERANCE, allocate, greedy_fill, hull, knapsack

SHAPES = st.tuples(st.sampled_from([4, 6, 8, 12, 16]), st.integers(4, 40))
WORTH = st.integers(0, 1000).map(lambda n: n / 1000)


def named(values):
    return {f"layer{i}": value for i, value in enumerate(values)}


def units_of(shape, kind):
    """How many zeros one unit is, and how many units a layer has."""
    return (shape[0], shape[1]) if kind == "row" else (1, shape[0] * shape[1])


@settings(max_examples=150, deadline=None)
@given(
    layers=st.lists(st.tuples(SHAPES, WORTH), min_size=1, max_size=8),
    budget=st.floats(0.02, 0.97),
    scale=st.sampled_from(["shift", "proportional", "inverse"]),
    kind=st.sampled_from(["row", "tensor"]),
    floor=st.sampled_from([0.0, 0.1]),
    cap=st.sampled_from([0.7, 0.99]),
)
def test_the_budget_is_met_as_nearly_as_whole_zeros_allow(layers, budget, scale, kind, floor, cap):
    shapes, worth = named(shape for shape, _ in layers), named(value for _, value in layers)
    pattern, size = Pattern(kind, 0.0), sum(rows * columns for rows, columns in shapes.values())
    bounds = []
    for shape in shapes.values():
        weight, units = units_of(shape, kind)
        bounds.append((weight, -int(-(floor * units - 1e-9) // 1), int(cap * units + 1e-9)))
    assume(all(low <= high for _, low, high in bounds))
    assume(sum(w * low for w, low, _ in bounds) <= budget * size <= sum(w * high for w, _, high in bounds))
    made = allocate(worth, shapes, budget, pattern=pattern, scale=scale, floor=floor, cap=cap)
    zeros = [Pattern(kind, made.sparsity[name]).zeros(shape) for name, shape in shapes.items()]
    for count, (weight, low, high) in zip(zeros, bounds, strict=True):
        assert count % weight == 0
        assert low <= count // weight <= high
    assert made.reached == pytest.approx(sum(zeros) / size, abs=1e-12)
    reachable = {0}
    for weight, low, high in bounds if kind == "row" else ():
        reachable = {total + weight * u for total in reachable for u in range(low, high + 1)}
    nearest = min(abs(total - budget * size) for total in reachable) if kind == "row" else 0.5
    assert abs(sum(zeros) - budget * size) <= max(nearest, TOLERANCE * size) + 1e-6


@settings(max_examples=100, deadline=None)
@given(
    worth=st.lists(WORTH, min_size=2, max_size=12),
    budget=st.floats(0.05, 0.9),
    scale=st.sampled_from(["shift", "proportional", "inverse"]),
)
def test_what_is_worth_more_keeps_more(worth, budget, scale):
    made = allocate(named(worth), named([(8, 30)] * len(worth)), budget, pattern=Pattern("row", 0), scale=scale, cap=0.95)
    in_order = sorted(zip(worth, made.sparsity.values(), strict=True))
    for (a, more), (b, fewer) in itertools.pairwise(in_order):
        assert a == b or more >= fewer, in_order


@pytest.mark.parametrize(
    ("scale", "worth", "budget", "cap", "expected"),
    [
        ("shift", (0.0, 0.2), 0.5, 0.99, (0.6, 0.4)),
        ("shift", (0.0, 0.2), 0.85, 0.9, (0.9, 0.8)),  # the cap holds one back
        ("proportional", (1.0, 3.0), 0.6, 0.8, (0.7, 0.5)),  # densities 0.2 + 0.1 and 0.2 + 0.3
        ("proportional", (0.0, 0.0), 0.6, 0.8, (0.6, 0.6)),  # nothing is known
        ("proportional", (0.0, 1.0), 0.2, 0.8, (0.4, 0.0)),  # one is full; the worthless one takes what is left
        ("inverse", (1.0, 2.0), 0.6, 0.99, (0.8, 0.4)),
    ],
)
def test_scales_by_hand(scale, worth, budget, cap, expected):
    made = allocate(named(worth), named([(5, 10), (5, 10)]), budget, pattern=Pattern("row", 0), scale=scale, cap=cap)
    assert tuple(made.sparsity.values()) == pytest.approx(expected)
    assert made.reached == pytest.approx(budget)


def test_the_mean_counts_weights_not_layers():
    made = allocate(named([0.0, 0.2]), named([(10, 100), (30, 100)]), 0.5, pattern=Pattern("row", 0))
    assert tuple(made.sparsity.values()) == pytest.approx((0.65, 0.45))


def test_a_total_that_neighbours_miss_is_found_further_off():
    """Rows of 32 and 48: 16 zeros more than wanted everywhere need one row more there and one less here."""
    shapes = named([(32, 8), (48, 8)])
    made = allocate(named([1.0, 1.0]), shapes, (32 * 3 + 48 * 5) / (80 * 8), pattern=Pattern("row", 0))
    assert made.reached * 80 * 8 == pytest.approx(336)


def test_a_budget_out_of_reach_names_what_is_in_reach():
    with pytest.raises(SparsightError, match=r"a mean of 0\.95 over 2 layers .* 0 to 0\.9 each; they reach 0 to 0\.9; ask"):
        allocate(named([1.0, 1.0]), named([(4, 10)] * 2), 0.95, pattern=Pattern("row", 0), cap=0.9)
    with pytest.raises(SparsightError, match=r"a mean of 0\.6 .* at 2:4 each; they reach 0 to 0\.5"):
        allocate(named([1.0]), named([(4, 8)]), 0.6, pattern=Pattern.nm(2, 4))


@pytest.mark.parametrize("pattern", [Pattern("row", 0), Pattern.nm(2, 4)])
def test_worth_that_is_not_a_number_is_refused(pattern):
    with pytest.raises(SparsightError, match="not a finite number"):
        allocate(named([1.0, float("nan")]), named([(4, 8)] * 2), 0.3, pattern=pattern)
    with pytest.raises(SparsightError, match="not a finite number"):
        allocate(named([[(0.9, float("nan"))]]), named([(4, 8)]), 0.3, pattern=pattern, scale="curves")


@settings(max_examples=200, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(1, 30), st.integers(-5, 20)), min_size=1, max_size=9),
    part=st.floats(0, 1.2),
)
def test_the_knapsack_equals_brute_force(items, part):
    size, value = np.array([s for s, _ in items]), np.array([float(v) for _, v in items])
    target = part * size.sum()
    choices = [np.array(c, dtype=bool) for c in itertools.product((False, True), repeat=len(items))]
    best = max((-abs(size[c].sum() - target), value[c].sum()) for c in choices)
    chosen = knapsack(size, value, target)
    assert (-abs(size[chosen].sum() - target), value[chosen].sum()) == pytest.approx(best)


def test_a_table_too_large_is_bucketed(monkeypatch):
    rng = np.random.default_rng(0)
    size, value = rng.integers(10**6, 10**7, 200), rng.random(200)
    monkeypatch.setattr(solver, "CELLS", 10**6)
    chosen = knapsack(size, value, 0.4 * size.sum())
    assert abs(size[chosen].sum() / size.sum() - 0.4) < 2e-3
    assert value[chosen].mean() > value.mean() + 0.1


def test_with_nm_the_most_important_layers_stay_dense():
    shapes = named([(8, 16), (16, 16), (16, 16), (24, 16)])
    made = allocate(named([0.9, 0.1, 0.8, 0.2]), shapes, 0.3125, pattern=Pattern.nm(2, 4))
    assert list(made.sparsity.values()) == [0.0, 0.5, 0.0, 0.5]  # 24 of 64 rows dense
    assert made.reached == 0.3125
    off = allocate(named([0.9, 0.1]), named([(8, 16), (8, 16)]), 0.3, pattern=Pattern.nm(2, 4))
    assert off.reached == 0.25  # nearer than 0.5, and told
    assert off.sparsity == {"layer0": 0.0, "layer1": 0.5}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), budget=st.integers(0, 10))
def test_curves_are_filled_at_the_least_cost(data, budget):
    """Against every way of giving three blocks of unlike size sparsities in steps of 0.1."""
    sizes, grid = np.array([100, 200, 300]), [i / 10 for i in range(11)]
    curves = [hull([(x / 10, data.draw(st.integers(0, 50)) / 10) for x in (2, 5, 10)]) for _ in sizes]
    filled = greedy_fill(curves, sizes, budget / 10, np.zeros(3), np.ones(3))

    def cost(sparsity):
        parts = zip(curves, sizes, sparsity, strict=True)
        return sum(np.interp(s, *zip(*curve, strict=True)) * size for curve, size, s in parts)

    ways = [w for w in itertools.product(grid, repeat=3) if abs(np.dot(w, sizes) - budget / 10 * 600) < 1e-6]
    assert filled @ sizes == pytest.approx(budget / 10 * 600)
    assert cost(filled) <= min(cost(way) for way in ways) + 1e-9


def test_hull_goes_below_what_bulges_up():
    assert hull([(0.25, 0.5), (0.5, 0.6), (0.75, 1.5)]) == [(0.0, 0.0), (0.5, 0.6), (0.75, 1.5)]
    assert hull([(0.5, 0.0), (0.9, 1.0)]) == [(0.0, 0.0), (0.5, 0.0), (0.9, 1.0)]
