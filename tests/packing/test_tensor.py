"""Tensors as bits and kept values: the same bytes come back, with and without compiled kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsight.errors import SparsightError
from sparsight.masks.pattern import Pattern
from sparsight.packing.squeeze import squeeze, unsqueeze
from sparsight.packing.tensor import Packed, row_offsets, unpack_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (5, 7), (16, 64), (3, 16, 40), (33, 100), (4, 513)]


@pytest.fixture(params=["1", "0"], autouse=True)
def kernels(request, monkeypatch):
    monkeypatch.setenv("SPARSIGHT_KERNELS", request.param)


def sparse(shape, dtype, sparsity=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator)
    return W.masked_fill(torch.rand(shape, generator=generator) < sparsity, 0.0).to(dtype)


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bytes_come_back(dtype, shape):
    W = sparse(shape, dtype)
    W.view(-1)[0] = -0.0  # a kept -0.0 is no zero
    packed = Packed.of(W)
    assert packed.values.numel() == int((W != 0).sum()) + 1
    assert packed.bits.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(raw(packed.expand()), raw(W))
    where = unpack_rows(packed.bits.reshape(-1, packed.bits.shape[-1]), shape[-1]).view(shape)
    assert torch.equal(where, (W != 0) | torch.signbit(W))
    assert torch.equal(
        row_offsets(packed.bits.reshape(-1, packed.bits.shape[-1])).diff(), where.reshape(-1, shape[-1]).sum(1)
    )


def test_rows_that_keep_the_same_number_have_a_row_of_values_each():
    score = torch.randn(12, 64)
    for pattern, k in ((Pattern("row", 0.75), 16), (Pattern.parse("2:4"), 32)):
        W = score.masked_fill(~pattern.keep(score.abs()), 0.0)
        assert Packed.of(W).values.shape == (12, k)
    assert Packed.of(sparse((12, 64), torch.float32)).values.ndim == 1


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_values_are_within_half_a_step(dtype, shape):
    W = sparse(shape, dtype)
    packed = Packed.int8(W)
    E = packed.expand(torch.float32)
    assert bool((E[W == 0] == 0).all())
    step = packed.scale.unsqueeze(-1)
    assert bool(((E - W.float()).abs() <= step * 0.5001).all())
    assert packed.values.dtype == torch.int8
    assert packed.values.numel() == int((W != 0).sum())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_int8_has_no_code_for_what_is_not_finite(value):
    W = sparse((4, 16), torch.bfloat16)
    W[1, 3] = value
    with pytest.raises(SparsightError, match="NaN or an infinite weight"):
        Packed.int8(W)
    assert torch.equal(raw(Packed.of(W).expand()), raw(W))


def test_bits_that_do_not_belong_to_the_values():
    packed = Packed.of(sparse((6, 20), torch.float32))
    flipped, beyond = packed.bits.clone(), packed.bits.clone()
    flipped[2, 1] ^= 4
    beyond[0, -1] ^= 128  # behind the last column
    beyond[0, 0] ^= packed.bits[0, 0] & -packed.bits[0, 0].to(torch.int16).to(torch.uint8)
    for wrong in (
        replace(packed, bits=flipped),
        replace(packed, bits=beyond),
        replace(packed, bits=packed.bits[:5]),
        replace(packed, values=packed.values[:-1]),
        replace(packed, shape=(6, 28)),
    ):
        with pytest.raises(SparsightError, match="do not belong to"):
            wrong.expand()


@pytest.mark.parametrize("shape", [(4096,), (64, 100), (3, 70, 50), (1 << 21,)])
def test_squeezed_values_come_back(shape):
    W = sparse(shape, torch.bfloat16, 0.0)
    squeezed = squeeze(W)
    assert squeezed.dtype == torch.uint8
    assert squeezed.ndim == 1
    assert squeezed.nbytes < 0.75 * W.nbytes
    assert torch.equal(raw(unsqueeze(squeezed)), raw(W))
    assert unsqueeze(squeezed).shape == W.shape


def test_what_is_not_squeezed():
    assert squeeze(torch.randn(100, 100)) is None
    assert squeeze(torch.randn(10).bfloat16()) is None
    noise = torch.from_numpy(np.random.default_rng(0).integers(-(2**15), 2**15, 1 << 14).astype(np.int16))
    assert squeeze(noise.view(torch.bfloat16)) is None  # every exponent, nothing is won


def test_damaged_squeezed_values():
    squeezed = squeeze(torch.randn(5000).bfloat16())
    for at in (0, 4, 8, 12):  # of the head
        wrong = squeezed.clone()
        wrong[at] ^= 255
        with pytest.raises(SparsightError, match="squeezed values are damaged"):
            unsqueeze(wrong)
    wrong = squeezed.clone()
    wrong[300] ^= 16  # of the exponents, which have a sum of checks
    for part in (squeezed[:3], squeezed[:40], squeezed[:-1], torch.cat([squeezed, squeezed[:1]]), wrong):
        with pytest.raises(SparsightError, match="squeezed values are damaged"):
            unsqueeze(part)
