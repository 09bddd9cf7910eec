"""Reconstruction of a folder, with one block of each model in memory, against that of models in memory."""

from __future__ import annotations

import warnings

import pytest
import torch

import sparsight
from sparsight import SparsightError, api
from sparsight.checkpoint.folder import read_metrics, read_record
from sparsight.data import read
from sparsight.errors import Interrupted
from sparsight.model.anatomy import anatomy
from sparsight.model.load import load, load_model
from sparsight.pruning.verb import encode
from sparsight.restoring.refit import refit
from sparsight.specs import RestoreSpec

from zoo import digest

HOW = {"steps": 0, "reconstruct": 2, "batch_size": 3}


@pytest.mark.parametrize(
    ("name", "method"),
    [("llava", "wanda"), ("qwen3-vl-moe", "wanda"), ("instructblip-t5", "sparsegpt"), ("gemma3", "magnitude")],
)
def test_the_weights_are_those_of_models_in_memory(name, method, zoo_folder, scenes, tmp_path):
    dense, sparse, out = zoo_folder(name), tmp_path / "sparse", tmp_path / "out"
    api.prune(dense, sparse, data=scenes, samples=6, sparsity=0.7, method=method)
    record = api.restore(sparse, out, data=scenes, **HOW)
    model, processor = load(sparse)
    whole = load_model(dense)
    spec = RestoreSpec.make(None, HOW)
    ready, _ = encode(read(scenes), processor, model, spec)
    names = [*read_record(sparse)["layers"]]
    expected = refit(whole, anatomy(whole), model, anatomy(model), names, ready, HOW["reconstruct"])
    fitted = load_model(out)
    for (key, mine), theirs in zip(fitted.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), key
    assert record.metrics["restore"]["reconstructed"] == expected.reconstructed
    before, after = zip(*expected.reconstructed.values(), strict=True)
    assert sum(after) < sum(before)
    assert api.verify(out, sparse)["differences"] == {}
    assert api.verify(out)["differences"] == {}
    assert record.sparsity["method"].endswith("+ reconstruct 2")
    assert read_metrics(out)["prune"] == read_metrics(sparse)["prune"]


def test_a_connector_that_was_trained_stays_so(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=6)
    model, processor = load(tmp_path / "sparse")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.mul_(1.5)
    sparsight.save(model, tmp_path / "other", processor, base_model=zoo_folder("llava"))
    api.restore(tmp_path / "other", tmp_path / "out", data=scenes, teacher=zoo_folder("llava"), **HOW)
    fitted = load_model(tmp_path / "out")
    assert torch.equal(fitted.model.multi_modal_projector.linear_1.weight, model.model.multi_modal_projector.linear_1.weight)


def test_it_goes_on_and_its_recipe_does_it_again(zoo_folder, scenes, tmp_path):
    def stop(note, done, total):
        if done == 2:
            raise KeyboardInterrupt

    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=6)
    api.restore(tmp_path / "sparse", tmp_path / "whole", data=scenes, **HOW)
    with pytest.raises(Interrupted):
        api.restore(tmp_path / "sparse", tmp_path / "out", data=scenes, progress=stop, **HOW)
    assert not (tmp_path / "out").exists()
    api.restore(tmp_path / "sparse", tmp_path / "out", data=scenes, resume=True, **HOW)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        api.run(tmp_path / "out" / "recipe.yaml", tmp_path / "again", [f"held_out={scenes}"])
    assert digest(tmp_path / "again" / "restored") == digest(tmp_path / "whole")


def test_whole_models_where_they_cannot_be_in_parts(zoo_folder, scenes, tmp_path, monkeypatch):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=6)
    api.restore(tmp_path / "sparse", tmp_path / "parts", data=scenes, **HOW)
    monkeypatch.setattr("sparsight.model.stream.LACKS", "no such function")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        api.restore(tmp_path / "sparse", tmp_path / "whole", data=scenes, **HOW)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_what_cannot_be_is_refused_in_one_line(zoo_folder, scenes, tmp_path, run):
    dense, sparse = zoo_folder("llava"), tmp_path / "sparse"
    api.prune(dense, sparse, data=scenes, samples=6)
    words = ["restore", sparse, "out", "--data", scenes, "--steps", 0]
    for more, said in (
        ((), "--steps: 0 trains nothing; say with --reconstruct how long to fit the blocks"),
        (("--reconstruct", 1, "--held-out", 2), "--held-out: is of training, and --steps is 0; leave one of the two out"),
        (("--reconstruct", 1, "--teacher", sparse), "is itself pruned where"),
        (("--reconstruct", 1, "--teacher", zoo_folder("gemma3")), "is not the same architecture"),
    ):
        code, out, errors = run(*words, *more)
        assert (code, out) == (2, ""), more
        assert said in errors.strip().splitlines()[-1]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse"]
    model, processor = load(sparse)
    with pytest.raises(SparsightError, match="0 is for a model in a folder"):
        api.restore(model, data=scenes, processor=processor, teacher=load_model(dense), **HOW)
