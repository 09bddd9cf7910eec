"""What a recipe will take, asked of the recipe itself: `run --cost` and `sweep --cost`."""

from __future__ import annotations

import json

import pytest
import yaml

from sparsight.api import estimate
from sparsight.estimation import machine
from sparsight.estimation.recipe import estimate_recipe


@pytest.fixture
def asked(zoo_folder, scenes, tmp_path, monkeypatch):
    """Write a recipe for a tiny model; `asked(prune=..., grid=...)` gives its path."""
    monkeypatch.setattr(
        machine, "measured_base", lambda where, dtype: dict.fromkeys(("load", "prune", "restore", "evaluate"), 0)
    )

    def written(**more):
        path = tmp_path / "r.yaml"
        shared = {"model": str(zoo_folder("llava")), "data": str(scenes), "held_out": str(scenes)}
        small = {"prune": {"samples": 4, "batch_size": 2}, "evaluate": {"batch_size": 2, "max_new_tokens": 3}}
        path.write_text(yaml.safe_dump({**shared, **small, **more}))
        return path

    return written


def test_a_road_costs_what_its_verbs_cost(asked, zoo_folder, scenes):
    restore = {"batch_size": 2, "accumulate": 2, "epochs": 2, "samples": 8, "rank": 3, "gradient_checkpointing": True}
    found = estimate_recipe(asked(restore=restore), timed=False)
    by_hand = estimate(
        zoo_folder("llava"), data=scenes, prune={"samples": 4, "batch_size": 2},
        restore={"batch_size": 2, "accumulate": 2, "steps": 4, "rank": 3, "gradient_checkpointing": True},
        evaluate={"batch_size": 2, "max_new_tokens": 3}, timed=False,
    )  # fmt: skip
    assert [x for x in found.stages if x.name != "prune"] == [x for x in by_hand.stages if x.name != "prune"]
    assert found["prune"].flops == by_hand["prune"].flops
    assert found["prune"].memory["weights"] == found["load"].memory["weights"]  # it stays in memory between the stages
    assert found.times == {"prune": 1, "restore": 1, "evaluate": 3}
    assert [stage.name for stage in estimate_recipe(asked(), timed=False).stages] == ["load", "prune", "evaluate"]


def test_a_grid_counts_its_cells_and_tells_the_costliest(asked):
    restore = {"steps": 1, "batch_size": 2}
    grid = {"sparsity": [0.5, 0.6], "method": ["wanda", "sparsegpt"], "restore": [None, restore]}
    found = estimate_recipe(asked(grid=grid, seeds=[0, 1]), timed=False)
    assert found.times == {"prune": 8, "restore": 8, "evaluate": 17}
    assert {"gram", "sparsegpt"} <= found["prune"].flops.keys()
    plain = estimate_recipe(asked(grid={**grid, "method": ["wanda"]}, seeds=[0, 1]), timed=False)
    assert plain["prune"].peak < found["prune"].peak
    longer = estimate_recipe(asked(grid={"sparsity": [0.5], "restore": [restore, {**restore, "steps": 9}]}), timed=False)
    single = estimate_recipe(asked(grid={"sparsity": [0.5], "restore": [restore]}), timed=False)
    assert longer.total["restore"] == 10 * single.total["restore"]
    assert longer.total["prune"] == single.total["prune"] == single["prune"].work
    untaught = estimate_recipe(asked(grid={"sparsity": [0.5], "restore": [{**restore, "kl": 0}]}), timed=False)
    assert "teacher" not in untaught["restore"].flops


def test_the_command_line_prints_it_and_writes_nothing(asked, run, tmp_path):
    recipe = asked(restore={"steps": 1, "batch_size": 2, "reconstruct": 2})
    code, out, _ = run("run", recipe, "out", "prune.sparsity=0.6", "--cost")
    assert code == 0
    for said in ("times", "restore", "In all", "TFLOPs", "Not counted: restore.reconstruct", "Nothing was run"):
        assert said in out
    facts = json.loads(run("sweep", asked(grid={"sparsity": [0.5]}), "out", "--cost", "--json")[1])
    assert facts["times"] == {"prune": 1, "restore": 0, "evaluate": 2}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["held_out=null"], "held_out is missing"),
        (["grid={sparsity: 0.5}"], "has a grid; ask sparsight sweep"),
        (["device=cuda"], "on the CPU, not on cuda"),
        (["prune.method=alps"], "what alps costs is not known"),
        (["prune.samples=0"], "prune.samples: 0"),
        (["data=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line(changes, says, asked, run):
    code, out, err = run("run", asked(), "out", *changes, "--cost")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
