"""Tensors of paused forwards in files: the values, the views, and what stays in memory."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from sparsight.calibration import park
from sparsight.calibration.park import Park


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(park, "LEAST", 64)


def test_values_views_and_strides_stay(tmp_path):
    base = torch.arange(240, dtype=torch.float32).reshape(12, 20)
    views = {"turned": base.T, "part": base[2:5, 1:9], "flat": base.reshape(-1)}
    before = {name: (view.clone(), view.stride(), view.storage_offset()) for name, view in views.items()}
    box = Park(tmp_path, "always")
    box.tensors([views, base])
    for name, view in views.items():
        assert torch.equal(view, before[name][0])
        assert (view.stride(), view.storage_offset()) == before[name][1:]
    assert box.moved == base.nbytes  # one storage
    base[2, 1] = -7  # a view of it was parked, and so was it
    assert views["part"][0, 0] == -7
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_every_dtype(dtype, tmp_path):
    values = torch.randint(0, 2, (50, 7)).to(dtype)
    before = values.clone()
    Park(tmp_path, "always").tensors([(values, [values])])
    assert torch.equal(values, before)


def test_parameters_and_small_tensors_stay(tmp_path):
    box = Park(tmp_path, "always")
    box.tensors([nn.Parameter(torch.ones(100, 100)), torch.ones(3)])
    assert box.moved == 0


def test_what_is_parked_is_not_parked_again_and_is_freed(tmp_path):
    box, values = Park(tmp_path, "always"), torch.ones(1000)
    for _ in range(3):
        box.tensors([values])
    assert box.moved == values.nbytes
    assert len(box._areas) == 1
    del values
    assert len(box._areas) == 0


def test_the_variables_of_a_forward_and_of_its_callers(tmp_path):
    box = Park(tmp_path, "always")

    def inner(hidden):
        box.forward(sys._getframe(), {"more": torch.zeros(30)})
        return hidden

    kept = torch.ones(40)
    assert torch.equal(inner(kept), torch.ones(40))
    assert box.moved == 40 * 4 + 30 * 4


def test_never_and_auto(tmp_path, monkeypatch):
    values = [torch.ones(1000) for _ in range(2)]
    for when, batches, moved in (("never", 10**9, 0), ("auto", 1, 0), ("auto", 10**9, 8000)):
        box = Park(tmp_path / "not there", when, batches)
        box.tensors([[x.clone() for x in values]])
        assert box.moved == moved
    assert box.folder == tmp_path
