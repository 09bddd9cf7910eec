"""`bench` as a user runs it: every figure is there, and what is slower is said to be."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import sparsight
from sparsight.evaluation import bench
from sparsight.packing import linear as linears
from sparsight.packing.linear import DenseLinear, SparseLinear
from sparsight.packing.timing import time_layer

import zoo


@pytest.fixture(scope="module")
def sparse(zoo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    sparsight.prune(zoo_folder("llava"), folder / "sparse", method="magnitude", sparsity=0.6, dtype="bfloat16")
    sparsight.pack(folder / "sparse", folder / "packed")
    return folder


def test_a_model_of_small_layers(sparse, run):
    code, out, _ = run("bench", sparse / "packed", "--repeats", 2, "--new-tokens", 1, "--quiet")
    assert code == 0
    assert "F.linear / packed" in out
    assert "all fit into a cache, and `load` keeps them dense" in out
    assert "tokens/s, dense" in out


def test_every_figure(sparse, run, monkeypatch):
    monkeypatch.setattr(bench, "SMALL", 0)
    code, out, _ = run("bench", sparse / "packed", "--repeats", 2, "--new-tokens", 2, "--quiet", "--json")
    assert code == 0
    facts = json.loads(out)
    model = sparsight.load(sparse / "sparse")[0]
    layers = [module for module in model.modules() if type(module) is nn.Linear and (module.weight == 0).any()]
    assert sum(layer["count"] for layer in facts["layers"]) == facts["packed_layers"] == len(layers)
    shapes = {(layer.out_features, layer.in_features) for layer in layers}
    assert {(layer["rows"], layer["columns"]) for layer in facts["layers"]} == shapes
    for layer in facts["layers"]:
        assert layer["sparsity"] == pytest.approx(0.6, abs=0.01)
        assert layer["bytes"]["packed"] < layer["bytes"]["dense"]
        for times in layer["ms"].values():
            assert {"F.linear bfloat16", "F.linear float16", "F.linear float32", "packed", "packed int8"} <= set(times)
            assert min(times.values()) > 0
    assert [run["batch"] for run in facts["generate"]] == [1, 2, 4, 8, 16]
    assert facts["memory"]["packed"] < facts["memory"]["dense"]
    assert set(facts["load"]["seconds"]) == {"load", "load, packed in memory"}
    assert facts["load"]["bytes"] == (sparse / "packed" / "model.safetensors").stat().st_size


def test_what_cannot_be_timed(zoo_folder, run):
    code, out, error = run("bench", zoo_folder("llava"), "--quiet")
    assert (code, out) == (2, "")
    assert "has no linear layer with zeros to time; prune it first" in error
    assert run("bench", zoo_folder("llava"), "--repeats", 0)[0] == 2


def test_a_layer_in_memory():
    layer = nn.Linear(96, 64, bias=False)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    facts = time_layer(layer, [1, 3], 2)
    assert set(facts["ms"]) == {1, 3}
    assert facts["bytes"]["dense"] == 2 * 64 * 96


def test_large_dense_layers_of_a_packed_model_multiply_by_our_own_product(sparse, monkeypatch):
    monkeypatch.setattr(linears, "SMALL", 0)
    model = zoo.build("llava")[0].to(torch.bfloat16) if hasattr(zoo, "build") else None
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        before = model(**inputs).logits
        linears.use_own_products(model)
        assert isinstance(model.lm_head, DenseLinear)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=2e-2, atol=2e-2)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()  # with gradients it is an ordinary layer
    assert model.lm_head.weight.grad is not None
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
