"""Every verb after another, as a user calls them, on every family: prune, verify, restore, verify, evaluate."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from peft import PeftConfig
from safetensors.torch import load_file

from sparsight import SparsightError, api, load, load_adapter
from sparsight.checkpoint.folder import read_anatomy, read_record
from sparsight.pruning.methods import Method

import zoo
from zoo import digest


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_verb(name, zoo_folder, scenes, tmp_path):
    dense = zoo_folder(name)
    pruned, restored = tmp_path / "pruned", tmp_path / "restored"
    record = api.prune(dense, pruned, data=scenes, pattern="2:4", samples=8, batch_size=4)
    assert all(entry["got"] == 0.5 for entry in record.sparsity["layers"].values())
    assert set(record.metrics["prune"]["layer_errors"]) == set(record.sparsity["layers"])
    assert all(0 < error < 2 for error in record.metrics["prune"]["block_errors"].values())
    assert api.verify(pruned)["differences"] == {}

    done = api.restore(pruned, restored, data=scenes, steps=3, batch_size=4, lr=5e-3, save_adapter=True)
    assert done.metrics["restore"]["teacher"] == "shared"
    curve = done.metrics["restore"]["curve"]
    assert len(curve) == 3
    assert all(row["ce"] > 0 and row["kl"] > 0 for row in curve)
    assert curve[-1]["learning_rate"] < curve[0]["learning_rate"]
    proof = api.verify(restored, against=pruned)
    assert proof["differences"] == {}
    assert proof["sparsity"] == 0.5
    assert digest(restored) != digest(pruned)

    model, processor = load(restored)
    assert type(model).__name__ == type(load(dense)[0]).__name__
    assert type(processor).__name__ == type(load(dense)[1]).__name__
    config = json.loads((restored / "config.json").read_text())
    assert "sparsity_config" not in json.dumps(config)
    result = api.evaluate(restored, data=scenes, max_new_tokens=4)
    assert len(result.predictions) == 12
    assert result.value("perplexity") > 1
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):  # not a dense LoRA by mistake
        PeftConfig.from_pretrained(str(restored / "adapter"))

    sparse, _ = load(pruned)
    merged = load_adapter(sparse, read_anatomy(sparse, read_record(pruned)), restored / "adapter").merge_and_unload()
    parts = [read_anatomy(m, read_record(restored)) for m in (merged, model)]
    for layer in read_record(restored)["layers"]:
        assert torch.equal(parts[0][layer].weight, parts[1][layer].weight), layer


def test_the_same_command_twice_writes_the_same_bytes(zoo_folder, scenes, tmp_path):
    dense = zoo_folder("instructblip-t5")
    for i in "ab":
        api.prune(dense, tmp_path / f"p{i}", data=scenes, sparsity=0.6, samples=8)
        api.restore(tmp_path / f"p{i}", tmp_path / f"r{i}", data=scenes, steps=4, batch_size=4, lr=1e-3)
    assert digest(tmp_path / "pa") == digest(tmp_path / "pb")
    assert digest(tmp_path / "ra") == digest(tmp_path / "rb")


@pytest.mark.parametrize("propagate", ["dense", "block"])
def test_propagation(propagate, zoo_folder, scenes, tmp_path):
    """Later blocks see pruned activations with `block` and dense ones with `dense`; the first block sees the same."""
    dense = zoo_folder("llava")
    record = api.prune(dense, tmp_path / "out", data=scenes, sparsity=0.6, samples=8, propagate=propagate)
    other = api.prune(dense, tmp_path / "b", data=scenes, sparsity=0.6, samples=8, propagate="block")
    same = [record.sparsity["layers"][n]["mask"] == e["mask"] for n, e in other.sparsity["layers"].items()]
    assert same[:6] == [True] * 6
    assert all(same) == (propagate == "block")
    assert api.verify(tmp_path / "out")["differences"] == {}


def test_plain_lora_merged_is_dense_and_reported_so(zoo_folder, scenes, tmp_path):
    dense = zoo_folder("instructblip-llama")
    api.prune(dense, tmp_path / "pruned", data=scenes, pattern="2:4", samples=8)
    done = api.restore(tmp_path / "pruned", tmp_path / "lora", data=scenes, steps=2, batch_size=4, adapter="lora", lr=1e-3)
    assert done.metrics["restore"]["teacher"] == "cached"
    got = [entry["got"] for entry in done.sparsity["layers"].values()]
    assert max(got) < 0.01
    assert len(api.verify(tmp_path / "lora", against=tmp_path / "pruned")["differences"]) == len(got)


def test_magnitude_needs_no_data(zoo_folder, scenes, tmp_path):
    record = api.prune(zoo_folder("llava"), tmp_path / "out", method="magnitude", sparsity=0.5)
    assert record.metrics["prune"]["layer_errors"] == {}
    assert api.verify(tmp_path / "out")["sparsity"] == 0.5


def test_a_function_is_a_method_and_the_teacher_is_cached(zoo_folder, scenes, tmp_path):
    def shrink(W, moments, pattern, generator):
        return (W * 0.9).masked_fill(~pattern.keep(W.abs().float() * moments.norm), 0)

    record = api.prune(zoo_folder("llava"), tmp_path / "p", data=scenes, method=shrink, samples=8)
    assert (record.sparsity["method"], record.sparsity["mask_only"]) == ("shrink", False)
    done = api.restore(tmp_path / "p", tmp_path / "r", data=scenes, steps=2, batch_size=4)
    assert done.metrics["restore"]["teacher"] == "cached"
    assert api.verify(tmp_path / "r", against=tmp_path / "p")["differences"] == {}


def test_zeros_of_another_tool_are_restored_too(zoo_folder, scenes, tmp_path):
    """No sparsity.json: the masks are read from the zeros."""
    model, processor = load(zoo_folder("llava"))
    weight = model.model.language_model.layers[0].mlp.up_proj.weight.data
    weight[:, ::2] = 0
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    api.restore(
        tmp_path / "other", tmp_path / "out", data=scenes, teacher=zoo_folder("llava"), steps=2, batch_size=4, lr=1e-2
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    key = next(k for k in found if k.endswith("layers.0.mlp.up_proj.weight") and "language" in k)
    assert (found[key][:, ::2] == 0).all()
    assert not torch.equal(found[key], weight)
    assert api.verify(tmp_path / "out", against=tmp_path / "other")["differences"] == {}


def test_bfloat16_all_the_way(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "p", data=scenes, sparsity=0.7, samples=8, dtype="bfloat16")
    api.restore(tmp_path / "p", tmp_path / "r", data=scenes, steps=2, batch_size=4, lr=1e-2)
    assert api.verify(tmp_path / "r", against=tmp_path / "p")["differences"] == {}
    assert {e["dtype"] for e in read_record(tmp_path / "r")["layers"].values()} == {"bfloat16"}


def test_pruning_in_two_steps_keeps_what_was_pruned_before(zoo_folder, scenes, tmp_path):
    """The record carries the earlier zeros on, the dense original stays the teacher, and restoring keeps both."""
    dense = zoo_folder("llava")
    api.prune(dense, tmp_path / "a", data=scenes, samples=8, sparsity="connector=0.5")
    api.prune(tmp_path / "a", tmp_path / "b", data=scenes, samples=8, sparsity="language=0.7")
    record = read_record(tmp_path / "b")
    assert record["base_model"] == str(dense)
    assert record["method"] == "wanda + wanda"
    assert {entry["component"] for entry in record["layers"].values()} == {"connector", "language"}
    done = api.restore(tmp_path / "b", tmp_path / "c", data=scenes, steps=2, batch_size=4, lr=1e-2)
    assert done.metrics["restore"]["teacher"] == "shared"
    for against in ("a", "b"):
        assert api.verify(tmp_path / "c", against=tmp_path / against)["differences"] == {}
    sparsity = {e["component"]: e["got"] for e in done.sparsity["layers"].values()}
    assert sparsity["connector"] == 0.5
    assert sparsity["language"] == pytest.approx(0.7, abs=0.02)


def test_a_teacher_that_is_itself_pruned_is_refused(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "a", data=scenes, samples=8)
    with pytest.raises(SparsightError, match="is itself pruned"):
        api.restore(tmp_path / "a", tmp_path / "b", data=scenes, teacher=tmp_path / "a", steps=1)
    assert not (tmp_path / "b").exists()


def test_an_output_that_holds_what_is_read_is_refused(zoo_folder, scenes, tmp_path):
    model = shutil.copytree(zoo_folder("llava"), tmp_path / "model")
    data = shutil.copytree(scenes, model / "data")
    for out in (model, tmp_path):
        with pytest.raises(SparsightError, match="holds what is read"):
            api.prune(model, out, data=data, overwrite=True)
    with pytest.raises(SparsightError, match="holds what is read"):
        api.prune(zoo_folder("llava"), model, data=data, overwrite=True)
    assert (model / "config.json").is_file()
    assert (data / "metadata.jsonl").is_file()


@pytest.mark.parametrize("name", ["instructblip-t5", "blip2-t5", "llava"])
def test_float16_all_the_way(name, zoo_folder, scenes, tmp_path):
    """BLIP and T5 keep a few parameters in float32 then; the layers come back in the dtype they were pruned in."""
    api.prune(zoo_folder(name), tmp_path / "p", method="magnitude", pattern="2:4", dtype="float16")
    assert {e["dtype"] for e in read_record(tmp_path / "p")["layers"].values()} <= {"float16", "float32"}
    assert api.verify(tmp_path / "p")["differences"] == {}
    done = api.restore(tmp_path / "p", tmp_path / "r", data=scenes, steps=1, batch_size=2)
    assert done.metrics["restore"]["teacher"] == "shared"
    assert api.verify(tmp_path / "r", against=tmp_path / "p")["differences"] == {}


def test_settings_may_be_numbers_of_numpy(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "p", data=scenes, samples=8, sparsity=np.float64(0.5))
    api.restore(tmp_path / "p", tmp_path / "r", data=scenes, steps=1, batch_size=2, lr=np.logspace(-4, -3, 2)[0])
    assert yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text())["restore"]["lr"] == pytest.approx(1e-4)


def test_damaged_records_are_found_before_the_training(zoo_folder, scenes, tmp_path):
    for name, text in (
        ("metrics.json", "{"),
        ("recipe.yaml", "a: ["),
        ("sparsity.json", '{"format": 1, "layers": {"a": {}}}'),
    ):
        folder = tmp_path / name
        api.prune(zoo_folder("llava"), folder, method="magnitude")
        (folder / name).write_text(text)
        with pytest.raises(SparsightError, match=rf"{name}: is damaged"):
            api.restore(folder, tmp_path / "out", data=scenes, steps=1)


def test_a_mask_only_method_that_changes_weights_is_named(zoo_folder, scenes, tmp_path):
    for method in (lambda W, moments, pattern, generator: W * 0.5, lambda W, moments, pattern, generator: W * float("nan")):
        with pytest.raises(SparsightError, match=r"layers\.0\.\S+: the method gave no finite .* holds the pattern"):
            api.prune(zoo_folder("llava"), tmp_path / "out", data=scenes, samples=8, method=method)
    without_data = Method(lambda W, moments, pattern, generator: W, needs=None)
    with pytest.raises(SparsightError, match=r"the method gave no finite"):
        api.prune(zoo_folder("llava"), tmp_path / "out", method=without_data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [-1, 2**32, True])
def test_seeds(seed, zoo_folder, scenes, tmp_path):
    for call in (
        lambda: api.prune(zoo_folder("llava"), tmp_path / "o", data=scenes, seed=seed),
        lambda: api.restore(zoo_folder("llava"), tmp_path / "o", data=scenes, seed=seed),
        lambda: api.evaluate(zoo_folder("llava"), data=scenes, seed=seed),
    ):
        with pytest.raises(SparsightError, match="`seed`"):
            call()


def test_a_few_zeros_are_kept_as_well_as_many(zoo_folder, scenes, tmp_path):
    """Half a per cent is less than what makes a layer of an unknown folder count as sparse; the record knows better."""
    api.prune(zoo_folder("llava"), tmp_path / "p", data=scenes, samples=8, pattern="tensor", sparsity=0.005)
    api.restore(tmp_path / "p", tmp_path / "r", data=scenes, steps=2, batch_size=4, lr=1e-2)
    found = api.verify(tmp_path / "r", against=tmp_path / "p")
    assert found["differences"] == {}
    assert found["sparsity"] == pytest.approx(0.005, rel=0.1)
