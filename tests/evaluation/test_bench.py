"""`bench` as a user runs it: every figure is there, and what is slower is said to be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

import sparsight
from sparsight.errors import SparsightError
from sparsight.evaluation import bench
from sparsight.packing import linear as linears
from sparsight.packing.linear import DenseLinear, SparseLinear
from sparsight.packing.timing import time_layer
from sparsight.reporting.runs import read_runs
from sparsight.reporting.speed_figures import speed

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


@pytest.fixture(scope="module")
def timed(sparse, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("timed") / "sparse"
    shutil.copytree(sparse / "sparse", folder)
    facts = sparsight.bench(folder, repeats=1, new_tokens=1, record=True)
    sparsight.evaluate(folder, scenes, max_new_tokens=1, record=True)
    return folder, facts


def test_a_record_is_a_figure_of_the_report(timed, tmp_path):
    folder, facts = timed
    assert json.loads((folder / "bench.json").read_text()) == facts
    page = sparsight.report([folder], out=tmp_path / "report.html", figures=tmp_path / "figures").read_text()
    assert "Speed of sparse, dense and packed" in page
    assert "All layers fit into a cache, where packed weights gain nothing." in page
    drawn = (tmp_path / "figures" / "speed-0.svg").read_text()
    for text in ("F.linear bfloat16", "packed int8", "tokens per second"):
        assert text in drawn
    (run,) = read_runs([folder])
    above, below = speed(run).axes
    heights = [bar.get_height() for bar in above.patches]
    assert sorted(heights) == sorted(ms for each in facts["layers"][-5:] for ms in each["ms"]["1"].values())
    assert len(below.patches) == 2 * len(facts["generate"])
    low, high = above.get_ylim()
    assert low < min(heights) < max(heights) < high
    marks = [
        label.get_text() for label, at in zip(above.get_yticklabels(), above.get_yticks(), strict=True) if low < at < high
    ]
    assert len([mark for mark in marks if mark]) >= 2, marks  # also where all bars lie in one decade


def test_a_record_of_other_weights_or_a_damaged_one_is_no_figure(timed, tmp_path):
    shutil.copytree(timed[0], tmp_path / "sparse")
    place, facts = tmp_path / "sparse" / "bench.json", timed[1]
    wrong = [
        (facts | {"weights": "others"}, "is of other weights than are there now; run sparsight bench"),
        (facts | {"format": 2}, "format 2 is not 1"),
        (facts | {"layers": [{"ms": {}}]}, "is damaged"),
        (facts | {"generate": []}, "is damaged"),
        ({"format": 1}, "is damaged"),
        ([], "is damaged"),
    ]
    for content, message in wrong:
        place.write_text(json.dumps(content))
        with pytest.raises(SparsightError, match=message):
            sparsight.report([tmp_path / "sparse"], out=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_packing_leaves_a_record_of_the_other_form(timed, tmp_path):
    sparsight.pack(timed[0], tmp_path / "packed")
    sparsight.unpack(tmp_path / "packed", tmp_path / "plain")
    for folder in ("packed", "plain"):
        assert not (tmp_path / folder / "bench.json").exists()
        assert (tmp_path / folder / "evaluation.json").exists()


def test_where_nothing_can_be_recorded_nothing_is_timed(run):
    code, out, error = run("bench", "some/model", "--record", "--quiet")
    assert (code, out) == (2, "")
    assert "some/model is not a folder; a record is kept beside the weights" in error


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
