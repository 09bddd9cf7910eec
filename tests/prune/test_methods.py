"""Common checks over every method, pattern and dtype; and what each method is by its formula."""

from __future__ import annotations

import pytest
import torch

from sparsight import Pattern, SparsightError
from sparsight.prune.methods import METHODS, find_method
from sparsight.prune.moments import Moments

PATTERNS = [Pattern.row(0.5), Pattern.row(0.7), Pattern.tensor(0.6), Pattern.nm(2, 4), Pattern.nm(4, 8)]


def case(dtype=torch.float32, dead=False):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(12, 32, generator=g).to(dtype)
    X = torch.randn(50, 32, generator=g).to(dtype) * torch.rand(32, generator=g).to(dtype)
    if dead:
        X[:, ::3] = 0
    moments = Moments(32, W.device)
    moments.add(X, 8)
    return W, X, moments


def run(name, W, moments, pattern, seed=0):
    return METHODS[name].prune(W, moments, pattern, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_common(name, pattern, dtype):
    W, _, moments = case(dtype)
    original = W.clone()
    pruned = run(name, W, moments, pattern)
    assert torch.equal(W, original)  # the input is not touched
    assert (pruned.shape, pruned.dtype, pruned.is_contiguous()) == (W.shape, dtype, True)
    assert int((pruned == 0).sum()) == pattern.zeros(tuple(W.shape))
    assert pattern.holds(pruned)
    kept = pruned != 0
    assert torch.equal(pruned[kept], W[kept])  # mask-only: kept weights are as they were
    assert torch.equal(run(name, W, moments, pattern), pruned)  # same seed, same bytes
    if name != "random":
        assert torch.equal(run(name, pruned, moments, pattern), pruned)  # idempotent


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_dead_inputs_give_no_nan(name, pattern):
    W, _, moments = case(dead=True)
    pruned = run(name, W, moments, pattern)
    assert torch.isfinite(pruned).all()
    assert int((pruned == 0).sum()) == pattern.zeros(tuple(W.shape))


def test_wanda_is_the_formula_of_the_paper():
    W, X, moments = case()
    pruned = run("wanda", W, moments, Pattern.row(0.5))
    score = W.abs() * X.pow(2).sum(0).sqrt()
    cut = score.sort(dim=1, stable=True).indices[:, :16]
    assert torch.equal(pruned, W.scatter(1, cut, 0.0))


def test_magnitude_takes_the_absolute_value():
    """The published code of the paper ranks W itself and would remove -3 before 1."""
    W = torch.tensor([[-3.0, 1.0, 2.0, -0.5]])
    assert run("magnitude", W, None, Pattern.row(0.5)).tolist() == [[-3.0, 0.0, 2.0, 0.0]]


def test_random_depends_on_the_seed_alone():
    W, _, moments = case()
    assert not torch.equal(run("random", W, moments, Pattern.row(0.5), 1), run("random", W, moments, Pattern.row(0.5), 2))


def test_names_are_checked_with_the_nearest_choice():
    with pytest.raises(SparsightError, match=r"'wnada'; did you mean wanda\? allowed: random, magnitude, wanda"):
        find_method("wnada")
