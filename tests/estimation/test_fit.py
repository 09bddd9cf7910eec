"""The batch of a restoration that fits into memory."""

from __future__ import annotations

import warnings

import pytest
import yaml

from sparsight import api
from sparsight.data import read
from sparsight.errors import Notice
from sparsight.estimation import fit
from sparsight.specs import RestoreSpec

import zoo


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, zoo_folder, scenes):
    out = tmp_path_factory.mktemp("fit") / "sparse"
    api.prune(zoo_folder("llava"), out, data=scenes, sparsity=0.5, samples=4)
    return out


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(fit, "SMALL", 0)


def chosen(sparse, scenes, free, **settings):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", Notice)
        spec = fit.fit_batch(sparse, read(scenes), RestoreSpec(**settings), free=free)
    return spec, [str(each.message) for each in said if each.category is Notice]


@pytest.mark.usefixtures("any_size")
def test_less_memory_means_fewer_samples_then_checkpointing_and_the_same_steps(sparse, scenes):
    plenty, said = chosen(sparse, scenes, 10**12, accumulate=2)
    assert (plenty, said) == (RestoreSpec(accumulate=2), [])
    stage = fit._stage(str(sparse), None, [*read(scenes)], RestoreSpec(accumulate=2))
    seen = []
    for share in (0.8, 0.3, 0.0):
        free = int(share * stage.peak)
        spec, said = chosen(sparse, scenes, free, accumulate=2)
        seen.append((spec.batch_size, spec.gradient_checkpointing))
        assert spec.batch_size * spec.accumulate == 64
        assert f"batch_size={spec.batch_size}, accumulate={spec.accumulate}" in said[0]
        assert ("gradient_checkpointing" in said[0]) == spec.gradient_checkpointing
        if seen[-1] != (1, True):
            assert fit._stage(str(sparse), None, [*read(scenes)], spec).peak <= free
    assert seen[0] == (16, False)
    assert seen[-1] == (1, True)
    assert seen == sorted(seen, reverse=True, key=lambda each: (not each[1], each[0]))


@pytest.mark.usefixtures("any_size")
def test_what_is_named_stays(sparse, scenes):
    spec, said = chosen(sparse, scenes, 1, batch_size=8)
    assert (spec, said) == (RestoreSpec(batch_size=8), [])
    spec, said = chosen(sparse, scenes, 1, gradient_checkpointing=True)
    assert (spec.batch_size, spec.gradient_checkpointing) == (1, True)
    assert "even so a step takes" in said[0]


def test_a_small_model_is_not_looked_at(sparse, scenes):
    assert chosen(sparse, scenes, 1) == (RestoreSpec(), [])


@pytest.mark.usefixtures("any_size")
def test_restore_without_options_takes_what_fits(sparse, scenes, run, tmp_path, monkeypatch):
    code, _, said = run("restore", sparse, "plenty", "--data", scenes, "--steps", 1, "--seed", 3)
    assert code == 0, said
    assert "batch_size=" not in said
    kept = yaml.safe_load((tmp_path / "plenty/recipe.yaml").read_text())["restore"]
    assert (kept["batch_size"], kept["accumulate"]) == (32, 1)
    needed = fit._stage(str(sparse), None, [*read(scenes)], RestoreSpec(batch_size=8, accumulate=4)).peak
    monkeypatch.setattr(fit, "free_memory", lambda device: 1.1 * needed / fit.SHARE)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, said = run("restore", sparse, "short", "--data", scenes, "--steps", 1, "--seed", 3)
    assert code == 0, said
    assert "batch_size=8, accumulate=4, since 32 samples at once would take" in said
    kept = yaml.safe_load((tmp_path / "short/recipe.yaml").read_text())["restore"]
    assert (kept["batch_size"], kept["accumulate"], kept["gradient_checkpointing"]) == (8, 4, False)


@pytest.mark.slow
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_family_can_be_traced(name, zoo_folder, scenes, tmp_path, caplog):
    api.prune(zoo_folder(name), tmp_path / "sparse", data=scenes, sparsity=0.5, samples=2)
    spec, said = chosen(tmp_path / "sparse", scenes, 1)
    assert (spec.batch_size, spec.gradient_checkpointing) == (1, True)
    assert said
