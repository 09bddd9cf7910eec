"""Zeros, masks and finiteness of whole matrices, against torch's own slow ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsight import Pattern
from sparsight.masks.matrix import (
    are_same,
    count_zeros,
    has_nan,
    is_finite,
    keep_only,
    kept_of_rows,
    mask_of,
    most_of_groups,
)
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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_only_what_a_mask_keeps_is_left_whatever_stood_elsewhere(dtype):
    W = torch.randn(17, 24).to(dtype)
    W[0, :4] = torch.tensor([float("nan"), -0.0, -1.0, 2.0]).to(dtype)
    W[1, :4] = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf")]).to(dtype)
    keep = torch.rand(17, 24) < 0.5
    keep[0, :4] = torch.tensor([False, False, False, True])
    keep[1, :4] = True
    before = W.clone()
    for weight, mask in ((W, keep), (W.T, keep.T), (W[1:, 2:], keep[1:, 2:]), (nn.Parameter(W), keep)):
        left = keep_only(weight, mask)
        assert (left.dtype, left.shape, left.requires_grad) == (dtype, weight.shape, False)
        bits, kept = left.contiguous().view(torch.uint8), mask.contiguous().repeat_interleave(dtype.itemsize, 1)
        assert torch.equal(bits[kept], weight.detach().contiguous().view(torch.uint8)[kept])
        assert not bits[~kept].any()
    assert torch.equal(W.view(torch.uint8), before.view(torch.uint8))
    assert not keep_only(W, torch.zeros_like(keep)).view(torch.uint8).any()  # +0.0, not -0.0
    assert keep_only(torch.zeros(0, 4, dtype=dtype), torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_found_among_infinities(dtype):
    W = torch.randn(33, 65).to(dtype)
    W[3, 4], W[5, 6] = float("inf"), -float("inf")
    assert not has_nan(W)
    for place in (0, 700, W.numel() - 1):
        broken = W.clone()
        broken.view(-1)[place] = float("nan")
        assert has_nan(broken)
        assert has_nan(broken.T)
    assert not has_nan(torch.zeros(0, 4, dtype=dtype))


def test_nothing_is_finite():
    assert is_finite(torch.zeros(0, 4))
    assert is_finite(torch.full((4, 4), torch.finfo(torch.float16).max, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_counted_with_those_below_zero(dtype):
    W = torch.tensor([[0.0, -0.0, 1.0], [-1.0, 0.0, torch.finfo(dtype).tiny]], dtype=dtype)
    assert count_zeros(W) == count_zeros(W.T) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mask_of_every_value(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(mask_of(every), every != 0)
    assert count_zeros(every) == 2
    assert torch.equal(mask_of(every.view(256, 256).T), every.view(256, 256).T != 0)
    wide = torch.tensor([0.0, -0.0, 1e-45, -1e-45, float("nan"), float("inf")])
    assert mask_of(wide).tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize("columns", [1, 5, 63, 64, 192, 16_384])
def test_what_is_kept_of_rows(columns):
    torch.manual_seed(0)
    keep = torch.rand(7, columns) < 0.7
    keep[3] = True
    assert kept_of_rows(keep).tolist() == keep.long().sum(1).tolist()
    assert kept_of_rows(keep.T.contiguous().T).tolist() == keep.long().sum(1).tolist()
    assert kept_of_rows(keep[:0]).tolist() == kept_of_rows(keep[:0, ::2]).tolist() == []
    beside = torch.cat([keep.new_zeros(3), keep.flatten()])[3:].view(keep.shape)  # begins in the middle of a word
    assert kept_of_rows(beside).tolist() == keep.long().sum(1).tolist()


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 16, 32])
def test_the_most_that_is_kept_of_a_group(m):
    torch.manual_seed(0)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        keep = torch.rand(9, 96) < share
        most = int(keep.view(-1, m).long().sum(1).max())
        assert most_of_groups(keep, m) == most_of_groups(keep.T.contiguous().T, m) == most
        beside = torch.cat([keep.new_zeros(3), keep.flatten()])[3:].view(keep.shape)  # begins in the middle of a word
        assert most_of_groups(beside, m) == most
    assert most_of_groups(keep[:0], m) == 0


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_bits_that_differ_where_something_is_kept(dtype):
    torch.manual_seed(0)
    W = torch.randn(9, 33).to(dtype)
    where = torch.rand(9, 33) < 0.5
    pruned = W.float().mul(where).to(dtype)
    assert are_same(pruned, W, where)
    assert are_same(pruned.T, W.T, where.T)
    pruned[where.nonzero().unbind(1)[0][-1], where.nonzero().unbind(1)[1][-1]] = 3
    assert not are_same(pruned, W, where)
    assert not are_same(pruned.T, W.T, where.T)


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
