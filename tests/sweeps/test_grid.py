"""From a recipe to cells: what stands in the file, what may be changed, and what is refused before anything runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparsight import SparsightError, recipe
from sparsight.demo import MODELS
from sparsight.restoring.verb import check_restore
from sparsight.sweeps.grid import Cell, cells

EXTRA = ("grid", "seeds")


def named(text):
    return [(cell.label, cell.seed) for cell in cells(yaml.safe_load(text))]


def test_every_combination_once_the_dense_model_first():
    found = named("""
        seeds: [0, 1]
        grid:
          - {sparsity: [0.5, "vision=0.5,language=0.5"], method: [wanda, magnitude]}
          - {sparsity: 0.5, restore: [null, {steps: 3}]}
    """)
    assert found == [
        ("dense", 0), ("50%, wanda", 0), ("50%, wanda", 1), ("50%, magnitude", 0), ("50%, magnitude", 1),
        ("50%, wanda + sparselora", 0), ("50%, wanda + sparselora", 1),
    ]  # fmt: skip


def test_a_fixed_sum_and_one_component_alone():
    found = cells(
        yaml.safe_load("""
        grid:
          sparsity: [{sum: 1.2, language: [0.3, 0.6]}, {alone: vision, at: [0, 0.3, 0.7]}]
    """)
    )
    assert [cell.facts["sparsity"] for cell in found] == [
        {}, {"vision": 0.9, "language": 0.3}, {"vision": 0.6, "language": 0.6}, {"vision": 0.3}, {"vision": 0.7},
    ]  # fmt: skip


def test_n_of_m_brings_its_own_sparsity_and_cells_have_names_of_their_own():
    found = cells(yaml.safe_load("grid: {pattern: ['2:4', '4:8', row], method: [wanda, sparsegpt], tokens: [all, text]}"))
    assert found[1].facts["sparsity"] == {"vision": 0.5, "language": 0.5}
    assert len({cell.id for cell in found}) == len(found) == 13
    assert all(set(cell.id) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for cell in found)


def test_cells_that_differ_in_restoration_share_a_pruning():
    plain, restored, other = (
        Cell(replace(cells({"grid": {"sparsity": 0.5}})[1].prune, seed=seed), restore)
        for restore, seed in ((None, 0), ({"steps": 3}, 0), (None, 1))
    )
    assert plain.pruning_id == restored.pruning_id != other.pruning_id


@given(
    st.lists(st.integers(1, 99), min_size=1, max_size=9, unique=True), st.lists(st.integers(0, 5), min_size=1, unique=True)
)
def test_as_many_cells_as_combinations(percents, seeds):
    found = cells({"seeds": seeds, "grid": {"sparsity": [p / 100 for p in percents], "pattern": ["row", "tensor"]}})
    assert len(found) == 1 + 2 * len(percents) * len(seeds) == len({cell.id for cell in found})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "nothing to sweep"),
        ("grid: []", "nothing to sweep"),
        ("grid: {}", "not a mapping of lists"),
        ("grid: {sparsity: []}", "sparsity is an empty list"),
        ("grid: {sparsities: [0.5]}", "did you mean sparsity"),
        ("grid: {sparsity: [1.5]}", "1.5 is not a sparsity"),
        ("grid: {sparsity: [0]}", "leaves every component dense"),
        ("grid: {sparsity: {sum: 1.0, vision: [0.0]}}", "language=1 of a sum of 1"),
        ("grid: {sparsity: {sum: 2.5, vision: [0.5]}}", "language=2"),
        ("grid: {sparsity: {sum: 1.0}}", "needs one list"),
        ("grid: {sparsity: {sum: x, vision: [0.5]}}", "'x' is not a number"),
        ("grid: {sparsity: {alone: visoin, at: [0.5]}}", "did you mean vision"),
        ("grid: {sparsity: {alone: vision}}", "at of"),
        ("grid: {sparsity: 0.5, method: [wandas]}", "did you mean wanda"),
        ("grid: {sparsity: 0.5, policy: [owls]}", "did you mean owl"),
        ("grid: {sparsity: 0.6, pattern: '2:4'}", "contradicts `pattern=2:4`"),
        ("grid: {sparsity: 0.5, propagate: layer, reconstruct: 2}", "`reconstruct`: needs whole blocks"),
        ("grid: {sparsity: 0.5, restore: {stepps: 3}}", "did you mean steps"),
        ("grid: {sparsity: [[0.5]]}", "is not a number"),
        ("grid: {sparsity: 0.5, samples: 0}", "`grid.samples`: 0"),
        ("grid: {sparsity: 0.5, restore: {adapter: sparslora}}", "did you mean sparselora"),
        ("grid: {sparsity: 0.5, restore: {lr: -1}}", "`restore.lr`: -1"),
        ("grid: {sparsity: 0.5, restore: {lr: much}}", "`restore.lr`: 'much' is not a number"),
        ("grid: {sparsity: 0.5, policy: [[1]]}", "`grid.policy`: [1] is not a word"),
        ("grid: {sparsity: 0.5, ignore: [5]}", "`grid.ignore`: 5 is not a list of words"),
        ("grid: {sparsity: 0.5, permute: [maybe]}", "'maybe' is neither true nor false"),
        ("grid: {sparsity: 0.5, restore: {tune: [5]}}", "`restore.tune`: [5] is not a list of words"),
        ("{grid: {sparsity: 0.5}, prune: {seed: 3}}", "takes its seeds from `seeds`"),
        ("{grid: {sparsity: 0.5}, seeds: []}", "seeds: []"),
        ("{grid: {sparsity: 0.5}, seeds: [-1]}", "`seed`: -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(text, says):
    with pytest.raises(SparsightError) as error:
        cells(yaml.safe_load(text))
    assert says in str(error.value)


def write(folder, text):
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_a_recipe_is_read_with_its_changes(tmp_path):
    (tmp_path / "train").mkdir()
    path = write(tmp_path, "{model: 'demo:llava', data: train, held_out: owner/name, prune: {samples: 8}}")
    found = recipe.read(
        path,
        ["prune.samples=4", "prune.method=ria", "restore.steps=7", "grid={sparsity: [0.5]}"],
        extra=EXTRA,
    )
    assert found == {
        "model": str(MODELS["llava"]), "data": str(tmp_path / "train"), "held_out": "owner/name",
        "prune": {"samples": 4, "method": "ria"}, "restore": {"steps": 7}, "grid": {"sparsity": [0.5]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "changes", "says"),
    [
        ("- 1", [], "holds no `key: value` lines"),
        ("a: [", [], "is no YAML"),
        ("{data: x}", [], "model is missing"),
        ("{model: x}", [], "data is missing"),
        ("{model: x, data: y, prunes: {}}", [], "did you mean prune"),
        ("{model: x, data: y, prune: 3}", [], "prune is 3 and not a mapping"),
        ("{model: x, data: y, prune: {sparsty: 0.5}}", [], "did you mean sparsity"),
        ("{model: x, data: y, prune: {device: cuda}}", [], "unknown key 'device'"),
        ("{model: 'demo:lava', data: y}", [], "did you mean llava"),
        ("{model: x, data: y}", ["prune.samples"], "is not KEY=VALUE"),
        ("{model: x, data: y}", ["=3"], "is not KEY=VALUE"),
        ("{model: x, data: y}", ["model.sub=3"], "model holds a value"),
        ("{model: x, data: y}", ["model=[a"], "the value is no YAML"),
    ],
)
def test_a_recipe_that_is_none_is_refused(text, changes, says, tmp_path):
    with pytest.raises(SparsightError) as error:
        recipe.read(write(tmp_path, text), changes, extra=EXTRA)
    assert says in str(error.value)


def test_numbers_are_those_a_person_means(tmp_path):
    """PyYAML by itself reads 1e-3 as a word and 2:4 as 124."""
    text = "{model: x, data: y, prune: {pattern: 2:4}, restore: {lr: 1e-3, held_out: 20}}"
    found = recipe.read(write(tmp_path, text), ["restore.kl=5e-1", "restore.steps=7"])
    assert found["prune"] == {"pattern": "2:4"}
    assert found["restore"] == {"lr": 0.001, "held_out": 20, "kl": 0.5, "steps": 7}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("evaluate: {batch_size: 0}", "`evaluate.batch_size`: 0"),
        ("evaluate: {samples: 2.5}", "`evaluate.samples`: 2.5"),
        ("prune: {samples: 1.5}", "`prune.samples`: 1.5"),
        ("restore: {kl: 2}", "`restore.kl`: 2"),
        ("restore: {held_out: nowhere.jsonl}", "nowhere.jsonl"),
        ("evaluate: {seed: -1}", "`evaluate.seed`: -1"),
    ],
)
def test_values_are_checked_before_anything_is_computed(section, says, tmp_path):
    def check():
        check_restore(recipe.spec_of(recipe.read(write(tmp_path, f"{{model: x, data: y, {section}}}")), "restore"))

    with pytest.raises(SparsightError) as error:
        check()
    assert says in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SparsightError, match="cannot be read"):
        recipe.read(tmp_path / "none.yaml")
