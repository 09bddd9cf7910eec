"""Zeros and finiteness of whole matrices, against torch's own slow ways."""

from __future__ import annotations

import pytest
import torch

from sparsight import Pattern
from sparsight.masks.counts import count_zeros, is_finite
from sparsight.restoring.refit import FixedPattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 129), (64, 256)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_entry_that_is_not_finite_is_found_wherever_it_is(dtype, shape, bad):
    W = torch.randn(shape).to(dtype)
    assert is_finite(W)
    assert is_finite(W.T)
    for place in {0, W.numel() // 2, W.numel() - 1}:
        broken = W.clone()
        broken.view(-1)[place] = bad
        assert not is_finite(broken)
        assert not is_finite(broken.T)


def test_nothing_is_finite():
    assert is_finite(torch.zeros(0, 4))
    assert is_finite(torch.full((4, 4), torch.finfo(torch.float16).max, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_counted_with_those_below_zero(dtype):
    W = torch.tensor([[0.0, -0.0, 1.0], [-1.0, 0.0, torch.finfo(dtype).tiny]], dtype=dtype)
    assert count_zeros(W) == count_zeros(W.T) == 3


@pytest.mark.parametrize("pattern", [Pattern.row(0.5), Pattern.tensor(0.5), Pattern.nm(2, 4), Pattern.nm(4, 512)])
def test_the_zeros_beyond_a_pattern(pattern):
    torch.manual_seed(0)
    W = torch.randn(1024, 16).T  # not contiguous
    pruned = W * pattern.keep(W.abs())
    assert pattern.surplus(pruned) == 0
    pruned[3, pruned[3].nonzero()[0]] = 0
    assert pattern.surplus(pruned) == 1
    full = W * pattern.keep(W.abs())
    full[5, (full[5] == 0).nonzero()[0]] = 1
    assert pattern.surplus(full) is None
    assert not pattern.holds(full)


def test_the_zeros_of_an_existing_weight():
    torch.manual_seed(0)
    W = torch.randn(7, 13)
    W[torch.rand(7, 13) < 0.6] = 0
    pattern = FixedPattern("tensor", count_zeros(W) / W.numel(), weight=W)
    assert pattern.surplus(2 * W) == 0
    fewer, other = W.clone(), W.clone()
    fewer.view(-1)[W.view(-1).nonzero()[:2]] = 0
    assert pattern.surplus(fewer) == 2
    other.view(-1)[(W.view(-1) == 0).nonzero()[0]] = 1  # as many zeros, but one of them elsewhere
    other.view(-1)[W.view(-1).nonzero()[0]] = 0
    assert pattern.surplus(other) is None
    assert not pattern.holds(other)
