"""A setting is declared once: a field that is added to a record of settings is found wherever settings are given."""

from __future__ import annotations

import json
import subprocess
import sys
from inspect import signature

import pytest
import yaml

import sparsight
from sparsight import PruneSpec, RestoreSpec, SparsightError, api
from sparsight.options import options
from sparsight.specs import SPECS

ADD_A_FIELD = """
import sys
from dataclasses import dataclass
from typing import Annotated

from sparsight import specs
from sparsight.options import Option


@dataclass(frozen=True, kw_only=True)
class PruneSpec(specs.PruneSpec):
    grain: Annotated[int, Option("A new field.", fits=lambda value: value >= 3, says="a grain of at least 3", cost=True)] = 3


specs.PruneSpec = specs.SPECS["prune"] = PruneSpec
"""
DRIVE = """
import contextlib, io, json
from inspect import signature
import sparsight
from sparsight.cli import app
from sparsight.estimation.estimate import estimate
from sparsight.sweeps.grid import cells

commands, model = json.loads(sys.argv[1]), sys.argv[2]
found = {}
for name, words in commands.items():
    sys.argv = ["sparsight", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app.main()
        except SystemExit as stop:
            found[name] = stop.code, out.getvalue(), err.getvalue()
found["default"] = signature(sparsight.prune).parameters["grain"].default
found["cells"] = [cell.facts["grain"] for cell in cells({"grid": {"sparsity": 0.5, "grain": [3, 4]}})]
found["estimated"] = sparsight.estimate(model, prune={"grain": 5}, timed=False)["prune"].name
for name, call in {
    "python": lambda: sparsight.prune(model, "no", sparsity=0.5, grain=2),
    "grid": lambda: cells({"grid": {"sparsity": 0.5, "grain": [2]}}),
    "estimate": lambda: sparsight.estimate(model, prune={"grain": 2}),
}.items():
    try:
        call()
    except sparsight.SparsightError as error:
        found[name] = str(error)
print(json.dumps(found))
"""
SAYS = "is not a grain of at least 3"


def script(code, *words, folder):
    """Run code in a process of its own."""
    words = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder)


def test_a_new_field_is_found_wherever_settings_are_given(zoo_folder, tmp_path):
    """An option with help and check, a key of a recipe, an axis of a sweep, an input of the estimate, a keyword."""
    model = str(zoo_folder("llava"))
    commands = {
        "help": ["prune", "--help"],
        "cost": ["plan", "--help"],
        "refused": ["prune", model, "out", "--grain", "2"],
        "pruned": ["prune", model, "out", "--method", "magnitude", "--grain", "4", "--quiet"],
        "recipe": ["run", "out/recipe.yaml", "again", "--quiet"],
        "refused recipe": ["run", "out/recipe.yaml", "other", "prune.grain=2"],
    }
    done = script(ADD_A_FIELD + DRIVE, json.dumps(commands), model, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "--grain <int>" in found["help"][1]
    assert "A new field.  [default: 3]" in found["help"][1]
    assert "--grain" in found["cost"][1]
    assert found["refused"][0] == 2
    assert f"--grain: 2 {SAYS}" in found["refused"][2]
    assert found["pruned"][0] == found["recipe"][0] == 0
    for folder in ("out", "again/pruned"):
        assert yaml.safe_load((tmp_path / folder / "recipe.yaml").read_text())["prune"]["grain"] == 4
    assert f"prune.grain: 2 {SAYS}" in found["refused recipe"][2]
    assert found["default"] == 3
    assert found["cells"] == [None, 3, 4]
    assert found["estimated"] == "prune"
    assert found["python"] == found["estimate"] == f"`grain`: 2 {SAYS}"
    assert found["grid"] == f"`grid.grain`: 2 {SAYS}"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again"}


@pytest.mark.parametrize("verb", sorted(SPECS))
def test_every_field_has_help_and_is_a_keyword(verb):
    parameters = signature(getattr(sparsight, verb)).parameters
    for name, (_, option) in options(SPECS[verb]).items():
        assert option.text().endswith((".", "]")), name
        assert parameters[name].default == getattr(SPECS[verb], name)


def test_a_record_of_settings_is_given_whole_or_changed(zoo_folder, tmp_path):
    spec = PruneSpec(method="magnitude", sparsity=0.6)
    api.prune(zoo_folder("llava"), tmp_path / "out", spec, pattern="tensor")
    section = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["prune"]
    assert section["method"] == "magnitude"
    assert section["pattern"] == "tensor"
    assert spec.pattern == "row"
    with pytest.raises(SparsightError, match="dict_keys is no record of settings"):
        api.prune(zoo_folder("llava"), tmp_path / "other", {}.keys())
    with pytest.raises(SparsightError, match="unknown key 'sparsty'; did you mean sparsity"):
        api.prune(zoo_folder("llava"), tmp_path / "other", sparsty=0.5)
    with pytest.raises(SparsightError, match="`kl`: 2 is not a weight from 0 to 1"):
        RestoreSpec(kl=2)


def test_stage_is_the_old_name_of_layer(zoo_folder, scenes, tmp_path):
    with pytest.warns(FutureWarning, match="`propagate=stage` is the old name of `propagate=layer`"):
        spec = PruneSpec(propagate="stage")
    assert spec.propagate == "layer"
    words = ["prune", zoo_folder("llava"), "out", "--data", scenes, "--samples", 4, "--propagate", "stage", "--quiet"]
    done = script("from sparsight.cli.app import main; main()", *words, folder=tmp_path)
    assert done.returncode == 0
    assert "--propagate stage is the old name of --propagate layer" in done.stderr
    assert yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["prune"]["propagate"] == "layer"


@pytest.mark.parametrize(
    ("field", "function", "form"),
    [
        ("method", lambda W, moments, pattern, g: W, r"(W, moments, pattern, *, generator)"),
        ("refine", lambda W, keep: keep, "(W, keep, moments, pattern)"),
        ("policy", lambda layers: {}, "(layers, budget) or (layers, budget, probe)"),
        ("tokens", lambda: {}, "(counts)"),
        ("metrics", lambda prediction: 1.0, "(prediction, answers)"),
    ],
)
def test_a_function_is_refused_before_the_work_if_it_cannot_be_called(field, function, form, zoo_folder, scenes):
    model = zoo_folder("llava")
    calls = {"metrics": lambda: api.evaluate(model, scenes, metrics=[function])}
    call = calls.get(field, lambda: api.prune(model, "out", data=scenes, samples=2, **{field: function}))
    with pytest.raises(SparsightError) as error:
        call()
    assert str(error.value).endswith(f"must be callable as {form}")
    assert str(error.value).startswith(f"`{field}`: <lambda>")
