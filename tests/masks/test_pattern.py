"""Exact counts, ties by index, zeros where the pattern says: goldens one can check by hand, and properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight import Pattern, SparsightError

quick = settings(max_examples=60, deadline=None)


def zeroed(pattern, rows):
    score = torch.tensor(rows, dtype=torch.float32)
    return (score * pattern.keep(score)).int().tolist()


def test_goldens():
    row = [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert zeroed(Pattern.nm(2, 4), row) == [[0, 0, 3, 4, 0, 0, 7, 8]]
    assert zeroed(Pattern.nm(1, 4), row) == [[0, 0, 0, 4, 0, 0, 0, 8]]
    assert zeroed(Pattern.nm(4, 8), row) == [[0, 0, 0, 0, 5, 6, 7, 8]]
    assert zeroed(Pattern.row(0.5), [[1, 2, 3, 4], [8, 7, 6, 5]]) == [[0, 0, 3, 4], [8, 7, 0, 0]]
    assert zeroed(Pattern.tensor(0.5), [[1, 2, 3, 4], [8, 7, 6, 5]]) == [[0, 0, 0, 0], [8, 7, 6, 5]]


def test_of_equal_scores_the_lower_index_stays():
    assert zeroed(Pattern.row(0.5), [[1, 1, 1, 1]]) == [[1, 1, 0, 0]]
    assert zeroed(Pattern.row(0.5), [[2, 1, 1, 1], [1, 1, 1, 2]]) == [[2, 1, 0, 0], [1, 0, 0, 2]]
    assert zeroed(Pattern.tensor(0.5), [[1, 1], [1, 1]]) == [[1, 1], [0, 0]]
    assert zeroed(Pattern.nm(2, 4), [[1, 1, 1, 1]]) == [[1, 1, 0, 0]]


@pytest.mark.parametrize(("sparsity", "columns", "zeros"), [(0.33, 10, 3), (0.35, 10, 4), (0.5, 5, 3), (0.04, 10, 0)])
def test_counts_are_rounded_to_the_nearest(sparsity, columns, zeros):
    pattern = Pattern.row(sparsity)
    assert pattern.zeros((3, columns)) == 3 * zeros
    assert int((~pattern.keep(torch.rand(3, columns))).sum()) == 3 * zeros


shapes = st.tuples(st.integers(1, 9), st.integers(1, 6).map(lambda n: 8 * n))
scores = st.tuples(shapes, st.integers(1, 6), st.integers(0, 2**31))


@given(scores, st.floats(0, 0.99))
@quick
def test_counts_are_exact_even_where_scores_tie(case, sparsity):
    (rows, columns), levels, seed = case
    score = torch.randint(0, levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    for pattern in (Pattern.row(sparsity), Pattern.tensor(sparsity)):
        keep = pattern.keep(score)
        assert int((~keep).sum()) == pattern.zeros((rows, columns))
    each = (~Pattern.row(sparsity).keep(score)).sum(1)
    assert each.unique().numel() == 1
    lowest_kept = score.masked_fill(~keep, float("inf")).min()
    highest_cut = score.masked_fill(keep, -float("inf")).max()
    assert lowest_kept >= highest_cut or bool(torch.isinf(lowest_kept) | torch.isinf(highest_cut))


@given(scores, st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (1, 2)]))
@quick
def test_every_group_of_m_keeps_the_n_largest(case, nm):
    (rows, columns), levels, seed = case
    n, m = nm
    score = torch.randint(0, levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    keep = Pattern.nm(n, m).keep(score).view(rows, -1, m)
    assert (keep.sum(2) == n).all()
    order = score.view(rows, -1, m).sort(dim=2, descending=True, stable=True).indices[..., :n]
    assert torch.equal(keep, torch.zeros_like(keep).scatter(2, order, True))


def test_nan_has_no_rank():
    with pytest.raises(ValueError, match="NaN"):
        Pattern.row(0.5).keep(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("text", ["row", "tensor", "2:4", "4:8"])
def test_what_is_written_can_be_read(text):
    pattern = Pattern.parse(text, 0.7)
    kind, _, sparsity = str(pattern).partition(" ")
    assert Pattern.parse(kind, float(sparsity or 0)) == pattern


def test_holds_looks_everywhere_the_pattern_does():
    nm, row, tensor = Pattern.nm(2, 4), Pattern.row(0.5), Pattern.tensor(0.5)
    one_sided = torch.tensor([[0.0, 0, 0, 0, 1, 1, 1, 1]])
    assert row.holds(one_sided)
    assert not nm.holds(one_sided)
    one_row = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1]])
    assert tensor.holds(one_row)
    assert not row.holds(one_row)
    assert not tensor.holds(torch.ones(2, 4))


@pytest.mark.parametrize(("text", "says"), [("4:2", "0 < n < m"), ("0:4", "0 < n < m"), ("rows", "not row, tensor or n:m")])
def test_bad_patterns_say_what_is_allowed(text, says):
    with pytest.raises(SparsightError, match=says):
        Pattern.parse(text)


@pytest.mark.parametrize("value", [1.0, -0.1, 50.0, float("nan")])
def test_bad_sparsities_say_what_is_allowed(value):
    with pytest.raises(SparsightError, match="fraction of zeros, from 0 to below 1"):
        Pattern.row(value)


@pytest.mark.parametrize(("n", "m"), [(256, 512), (1, 300), (299, 300)])
def test_groups_may_be_large(n, m):
    keep = Pattern.nm(n, m).keep(torch.rand(2, 2 * m, generator=torch.Generator().manual_seed(0)))
    assert (keep.view(2, 2, m).sum(2) == n).all()
