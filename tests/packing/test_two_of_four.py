"""2:4 products on a CUDA device: which weights have one, and, on a GPU, that the faster form is named."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsight.masks.pattern import Pattern
from sparsight.packing.two_of_four import is_two_of_four, time_two_of_four


def two_of_four(rows, columns):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return W * Pattern.parse("2:4").keep(W.abs())


def test_which_weights_have_a_product():
    assert is_two_of_four(two_of_four(32, 64))
    assert not is_two_of_four(torch.randn(32, 64))
    assert not is_two_of_four(two_of_four(33, 64))  # rows
    assert not is_two_of_four(two_of_four(32, 72))  # columns
    assert is_two_of_four(torch.zeros(16, 16))


def test_without_a_device_or_for_other_weights_there_is_no_time():
    assert time_two_of_four(torch.randn(64, 64), 1) is None
    if not torch.cuda.is_available():
        assert time_two_of_four(two_of_four(64, 64), 1) is None


@pytest.mark.gpu
def test_times_on_a_gpu():
    W = two_of_four(4096, 4096)
    facts = time_two_of_four(W, 5, (1, 256, 4096))
    assert facts is not None
    for times in facts["ms"].values():
        assert min(times["dense"], times["2:4"]) > 0
        assert times["use"] == ("2:4" if times["2:4"] < times["dense"] else "dense")
    W, x = W.cuda().bfloat16(), torch.randn(64, 4096, device="cuda").bfloat16()
    sparse = torch.sparse.to_sparse_semi_structured(W, alg_id=facts["ms"]["256"]["alg_id"])
    torch.testing.assert_close(F.linear(x, sparse), F.linear(x, W), rtol=2e-2, atol=0.5)
