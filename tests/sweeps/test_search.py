"""Searching a split: the budget is kept, the best of what was measured is taken, and the model on disk is that plan."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sparsight import SparsightError, api, load
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.model.anatomy import anatomy


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write(folder / "train", "train", 16, seed=0, questions_per_scene=1)
    write(folder / "test", "test", 8, seed=0)
    return folder


@pytest.fixture
def asked(home):
    return {
        "data": home / "train", "held_out": home / "test", "samples": 8, "max_new_tokens": 40, "held_out_samples": 6,
        "dtype": "float32",
    }  # fmt: skip


def zeros(folder):
    model, _ = load(folder)
    return {x.name: int((x.weight == 0).sum()) for x in anatomy(model).layers}


def test_the_least_harm_at_the_same_number_of_zeros(asked, tmp_path):
    found = api.search(MODELS["llava"], tmp_path / "out", sparsity="vision=0.4,language=0.75", **asked)
    least = min(tried["divergence"] for tried in found.tried)
    assert found.chosen.divergence == least < found.given.divergence
    assert found.given.components == pytest.approx({"vision": 0.4, "language": 0.75}, abs=0.01)
    counted = zeros(tmp_path / "out")
    body = anatomy(load(MODELS["llava"])[0])
    size = {c: sum(x.weight.numel() for x in body.component(c)) for c in ("vision", "language")}
    wanted = 0.4 * size["vision"] + 0.75 * size["language"]
    assert abs(sum(counted.values()) - wanted) <= 1e-4 * sum(size.values()) + 2  # two dense weights are zeros by chance
    assert not api.verify(tmp_path / "out")["differences"]
    assert json.loads((tmp_path / "out" / "search.json").read_text())["chosen"]["divergence"] == least
    assert found.evaluations <= 3
    result = api.evaluate(tmp_path / "out", data=asked["held_out"], samples=6, max_new_tokens=40, dtype="float32")
    assert result.value("exact_match") == found.chosen_score["value"]


def test_a_divergence_is_that_of_the_model_pruned_so(asked, home, tmp_path):
    from sparsight.calibration.probe import Probe
    from sparsight.data import Encoder, batches, read

    found = api.search(MODELS["llava"], tmp_path / "out", sparsity=0.7, over="components", **asked)
    dense, processor = load(MODELS["llava"], dtype="float32")
    sparse, _ = load(tmp_path / "out", dtype="float32")
    encoder = Encoder(processor, dense)
    samples = encoder.usable(read(home / "train", limit=8, seed=0))
    measure = Probe(dense, anatomy(dense), list(batches(samples, encoder, 8)))
    measure.dense_answers()
    with measure.changed({x.name: x.weight for x in anatomy(sparse).layers}):
        drift = measure.drift()
    assert drift == pytest.approx(found.chosen.divergence)


@pytest.mark.slow  # the guide to sweeps runs one in the quick tests
def test_the_sparsest_within_a_loss(asked, tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "sparsight", "search", str(MODELS["llava"]), str(tmp_path / "out"),
            "--data", str(asked["data"]), "--held-out", str(asked["held_out"]), "--samples", "8", "--held-out-samples", "8",
            "--max-new-tokens", "40",
            "--within", "0.2", "--over", "components", "--dtype", "float32", "--json", "--quiet",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kept = [step for step in found["steps"] if step["fits"]]
    lost = [step for step in found["steps"] if not step["fits"]]
    assert kept
    assert lost
    assert found["budget"] == max(step["budget"] for step in kept) < min(step["budget"] for step in lost)
    assert found["chosen_score"]["value"] >= found["dense_score"]["value"] - 0.2


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"pattern": "2:4", "sparsity": None}, "has one sparsity only"),
        ({"sparsity": 1.5}, "1.5 is not a sparsity"),
        ({"over": "layers"}, "`over`: unknown value 'layers'"),
        ({"within": -0.1}, "`within`: -0.1"),
        ({"method": "wandas"}, "did you mean wanda"),
        ({"held_out": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"samples": 0}, "`samples`: 0"),
    ],
)
def test_what_cannot_be_searched(how, says, asked, tmp_path):
    with pytest.raises(SparsightError) as error:
        api.search(MODELS["llava"], tmp_path / "out", **{**asked, **how})
    assert says in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_no_plan_keeps(asked, tmp_path, zoo_folder, scenes):
    given = {**asked, "data": scenes, "held_out": scenes}
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=4)
    with pytest.raises(SparsightError, match="is pruned already"):
        api.search(tmp_path / "sparse", tmp_path / "out", **given)
