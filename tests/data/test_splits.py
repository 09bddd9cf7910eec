"""Which split of a dataset is read, and where it is said."""

import json
import shutil

import datasets
import pytest
import yaml

from sparsight import api
from sparsight.data import Source, read
from sparsight.data.tables import choose_split
from sparsight.errors import SparsightError
from sparsight.specs import EvaluateSpec, PruneSpec, RestoreSpec

import zoo


def table(name, rows=6):
    columns = {"prompt": [f"{name}?"] * rows, "answer": ["red"] * rows, "image": zoo.images(rows)}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Write a dataset with these splits, saved or as parquet files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(*splits, kind="saved"):
        folder = tmp_path / f"{kind}-{'-'.join(splits)}"
        if kind == "saved":
            datasets.DatasetDict({name: table(name) for name in splits}).save_to_disk(folder)
        else:
            folder.mkdir()
            for name in splits:
                table(name).to_parquet(folder / f"{name}-00000-of-00001.parquet")
        return folder

    return write


def asked(samples):
    (prompt,) = {sample.prompt for sample in samples}
    return prompt.removesuffix("?")


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_training_takes_train_and_scoring_never_does(saved, kind):
    whole = saved("train", "validation", "test", kind=kind)
    for how, split in (({}, "train"), ({"held_out": True}, "test"), ({"split": "validation"}, "validation")):
        got = read(whole, **how)
        assert (asked(got), got.split, got.facts) == (split, split, {"split": split})
    assert asked(read(saved("train", "validation", kind=kind), held_out=True)) == "validation"
    only = saved("train", kind=kind)
    with pytest.raises(
        SparsightError, match="has no split to score on, only 'train'; give other data, or say `split=train`"
    ):
        read(only, held_out=True)
    assert asked(read(only, held_out=True, split="train")) == "train"
    with pytest.raises(SparsightError, match="no split 'train'; it has 'test'; name one with `split`"):
        read(saved("test", kind=kind))
    with pytest.raises(SparsightError, match="no split 'dev'; it has"):
        read(whole, split="dev")


def test_a_bad_row_names_its_split(saved, tmp_path):
    made = datasets.DatasetDict({"test": table("test").add_column("kind", [1] * 6)})
    made.save_to_disk(tmp_path / "bad")
    with pytest.raises(SparsightError, match=r"bad\[test\]:0: 'kind' must be a string"):
        read(tmp_path / "bad", held_out=True)


def test_what_has_no_splits_takes_none(saved, tmp_path, scenes):
    table("one").save_to_disk(tmp_path / "one")
    (tmp_path / "flat").mkdir()
    table("flat").to_parquet(tmp_path / "flat" / "part-0.parquet")
    for source, name in (
        (tmp_path / "one", "one"),
        (tmp_path / "flat", "flat"),
        (tmp_path / "flat" / "part-0.parquet", "flat"),
    ):
        for held_out in (False, True):
            got = read(source, held_out=held_out)
            assert (asked(got), got.facts) == (name, {})
    for source in (tmp_path / "one", tmp_path / "flat", scenes, scenes / "metadata.jsonl"):
        with pytest.raises(SparsightError, match="has no splits, so there is no 'test'; leave `split` out"):
            read(source, split="test")


@pytest.mark.parametrize(
    ("names", "split", "held_out", "chosen"),
    [
        (["train", "val"], None, True, "val"),
        (["dev", "train"], None, True, "dev"),
        (["train", "test"], "train[:5]", False, "train[:5]"),
        (["a", "train"], None, False, "train"),
        (["test", "validation"], None, True, "test"),
        (["a"], "a", True, "a"),
    ],
)
def test_the_choice(names, split, held_out, chosen):
    assert choose_split("x", names, split, held_out) == chosen


def test_an_opened_source_keeps_its_split(saved):
    whole = saved("train", "test")
    with pytest.raises(SparsightError, match="was opened to train on; open it with `held_out=True`"):
        read(Source(whole), held_out=True)
    with pytest.raises(SparsightError, match="was opened for another split than 'test'"):
        read(Source(whole), split="test")
    assert asked(read(Source(whole, held_out=True), held_out=True)) == "test"
    assert asked(read(Source(whole, "train"), held_out=True)) == "train"


def test_a_split_of_no_data_is_refused():
    for held_out in (None, 4, "4"):
        with pytest.raises(SparsightError, match="`held_out_split`: needs data of its own"):
            RestoreSpec(held_out=held_out, held_out_split="test")


def test_a_split_is_of_the_data_of_one_verb():
    made = EvaluateSpec.make(PruneSpec(split="train", max_length=9), {})
    assert (made.split, made.max_length) == (None, 9)


def test_every_command_says_what_it_read(saved, run, zoo_folder, tmp_path):
    whole, model = saved("train", "validation", "test"), zoo_folder("llava")
    code, out, _ = run("eval", model, "--data", whole, "--max-new-tokens", 1)
    assert (code, "Read the split 'test' of the data" in out) == (0, True)
    code, out, _ = run("eval", model, "--data", whole, "--split", "validation", "--max-new-tokens", 1, "--json")
    assert json.loads(out)["data"] == {"split": "validation"}
    code, out, _ = run("prune", model, "sparse", "--data", whole, "--samples", 4)
    assert (code, "Read the split 'train' of the data" in out) == (0, True)
    code, out, _ = run(
        "restore",
        "sparse",
        "restored",
        "--data",
        whole,
        "--held-out",
        whole,
        "--split",
        "test",
        "--held-out-split",
        "validation",
        "--steps",
        1,
        "--batch-size",
        2,
    )
    assert code == 0
    assert "Read the split 'test' of the data" in out
    assert "Read the split 'validation' of the held-out data" in out
    metrics = json.loads((tmp_path / "restored" / "metrics.json").read_text())
    assert metrics["prune"]["data"] == {"split": "train"}
    assert (metrics["restore"]["data"], metrics["restore"]["held_out_data"]) == ({"split": "test"}, {"split": "validation"})
    recipe = yaml.safe_load((tmp_path / "restored" / "recipe.yaml").read_text())
    assert recipe["prune"]["split"] == "train"
    assert (recipe["restore"]["split"], recipe["restore"]["held_out_split"]) == ("test", "validation")
    done = api.run(tmp_path / "restored" / "recipe.yaml", tmp_path / "again", changes=["evaluate=null"])
    assert done["verify"]["differences"] == {}
    assert zoo.digest(tmp_path / "again" / "restored") == zoo.digest(tmp_path / "restored")
    shutil.rmtree(whole / "test")
    (whole / "dataset_dict.json").write_text('{"splits": ["train"]}')
    code, _, err = run("eval", model, "--data", whole)
    assert (code, "--split train" in err) == (2, True)


def test_a_recipe_reads_each_split_by_its_section(saved, zoo_folder, tmp_path):
    whole = saved("train", "validation", "test")
    recipe = {
        "model": str(zoo_folder("llava")),
        "data": str(whole),
        "held_out": str(whole),
        "prune": {"sparsity": 0.5, "samples": 4},
        "evaluate": {"max_new_tokens": 1, "split": "validation"},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = api.run(tmp_path / "r.yaml", tmp_path / "out")
    assert done["data"] == {"data": {"split": "train"}, "held_out": {"split": "validation"}}
    found = json.loads((tmp_path / "out" / "pruned" / "evaluation.json").read_text())
    assert found["read"] == {"split": "validation"}
