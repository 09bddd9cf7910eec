"""Sweeps as a user runs them: the same results as one command after another, once each, whatever happens between."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sparsight import SparsightError, api
from sparsight import recipe as recipes
from sparsight.checkpoint.lock import locked
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.errors import Interrupted, OutOfMemory
from sparsight.sweeps.grid import cells
from sparsight.sweeps.sweep import EXTRA
from sparsight.sweeps.workbench import Workbench

import zoo

RECIPE = {
    "model": "model", "data": "train", "held_out": "test", "dtype": "float32",
    "evaluate": {"max_new_tokens": 8, "samples": 6}, "prune": {"samples": 8},
}  # fmt: skip
COMMAND = [sys.executable, "-m", "sparsight"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    zoo.folder("llava", folder / "model")
    write(folder / "train", "train", 16, seed=0, questions_per_scene=1)
    write(folder / "test", "test", 6, seed=0)
    return folder


def recipe(home: Path, name: str, **more) -> Path:
    """A recipe on a tiny model. One whose work is compared with another process's takes the demo model, whose pictures need
    no resizing: `zoo` brings torchvision into this process, which resizes with other last bits."""
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **more}))
    return path


def answers(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "cells").glob("*.jsonl"))}


def scores(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_sweep_finds_what_prune_restore_and_eval_find(home, tmp_path):
    grid = [
        {"sparsity": [0.6, "vision=0.7"], "method": ["wanda", "sparsegpt"], "policy": ["uniform", "owl"]},
        {"pattern": ["2:4"], "propagate": ["block"], "restore": [None, {"steps": 2, "batch_size": 4, "lr": 1e-3}]},
    ]
    records = api.sweep(recipe(home, "same", model="demo:llava", grid=grid), tmp_path / "out")
    assert [r["label"] for r in records].count("dense") == 1
    assert len(records) == len(scores(tmp_path / "out")) == 11
    picked = {r["label"]: r for r in records}
    for label in ("60%, wanda", "vision 0.7, sparsegpt, owl", "2:4, wanda + sparselora"):
        cell = picked[label]["cell"]
        how = {key: cell[key] for key in ("pattern", "method", "policy", "propagate", "samples", "seed")}
        how["sparsity"] = None if cell["pattern"] == "2:4" else cell["sparsity"]
        folder = tmp_path / label.replace(":", "-")
        record = api.prune(MODELS["llava"], folder, data=home / "train", dtype="float32", **how)
        assert {n: x["got"] for n, x in record.sparsity["layers"].items()} == pytest.approx(
            {n: x["got"] for n, x in picked[label]["layers"].items()}
        )
        if cell["restore"] is None:
            assert record.metrics["prune"]["layer_errors"] == {n: x["error"] for n, x in picked[label]["layers"].items()}
        else:
            restored = folder.with_name("restored")
            api.restore(folder, restored, data=home / "train", dtype="float32", **cell["restore"])
            folder = restored
        result = api.evaluate(folder, data=home / "test", dtype="float32", max_new_tokens=8, samples=6)
        result.write_predictions(tmp_path / "alone.jsonl")
        swept = tmp_path / "out" / "cells" / f"{picked[label]['id']}.jsonl"
        assert swept.read_text() == (tmp_path / "alone.jsonl").read_text()
        assert picked[label]["scores"] == json.loads(result.to_json())["metrics"]
    assert picked["2:4, wanda + sparselora"]["verified"] is True
    assert len(picked["2:4, wanda + sparselora"]["curve"]) == 2
    row = next(r for r in scores(tmp_path / "out") if r["label"] == "60%, wanda")
    assert float(row["vision"]) == pytest.approx(0.6, abs=0.01)
    assert row["exact_match"] == str(
        next(s["value"] for s in picked["60%, wanda"]["scores"] if s["metric"] == "exact_match")
    )


def test_two_processes_find_the_same_and_nothing_is_left_of_the_work(home, tmp_path):
    path = recipe(home, "jobs", model="demo:llava", grid={"sparsity": [0.5]}, seeds=[0, 1])
    seen = []
    api.sweep(path, tmp_path / "one", progress=lambda note, done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)
    run = [*COMMAND, "sweep", path, tmp_path / "two", "--jobs", "2", "--quiet"]
    done = subprocess.run([*map(str, run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 cells" in done.stdout
    assert scores(tmp_path / "one") == scores(tmp_path / "two")
    assert answers(tmp_path / "one") == answers(tmp_path / "two")
    assert not (tmp_path / "two" / "work").exists()


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_in_the_middle_no_finished_cell_runs_twice(jobs, home, tmp_path):
    path = recipe(home, f"killed-{jobs}", model="demo:llava", grid={"sparsity": [0.4, 0.5, 0.6]})
    api.sweep(path, tmp_path / "whole")
    out = tmp_path / "out"
    run = [*map(str, [*COMMAND, "sweep", path, out, "--quiet", "--jobs", jobs])]
    with subprocess.Popen(run, start_new_session=True) as process:
        while process.poll() is None and len(list(out.glob("cells/*.json"))) < 2:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}
    assert 2 <= len(finished) < 4
    assert not (out / "results.csv").exists()
    seen = []
    api.sweep(path, out, progress=lambda note, done, total: seen.append(done))
    assert seen[0] == len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert answers(out) == answers(tmp_path / "whole")
    assert scores(out) == scores(tmp_path / "whole")


def test_ctrl_c_says_how_to_go_on(home, tmp_path):
    path = recipe(home, "stop", grid={"sparsity": [0.5]})

    def stop(note, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="1 of 2 cells are finished: the same command goes on"):
        api.sweep(path, tmp_path / "out", progress=stop)
    assert len(api.sweep(path, tmp_path / "out")) == 2


def test_an_error_while_pruning_leaves_the_dense_model_for_the_next_cell(home, tmp_path):
    asked = recipes.read(recipe(home, "error", grid={"sparsity": [0.5]}), extra=EXTRA)
    bench, cell = Workbench(asked, tmp_path), cells(asked)[1]
    dense, prune = bench.hash(), bench.prune

    def broken(cell, plan):
        prune(cell, plan)
        assert bench.hash() != dense
        raise MemoryError

    bench.prune = broken
    with pytest.raises(OutOfMemory, match=r"lower `prune\.batch_size`"):
        bench.measure([cell], lambda *facts: None, print)
    assert bench.hash() == dense


def test_a_damaged_record_is_named_and_measured_again_once_it_is_gone(home, tmp_path):
    path, out = recipe(home, "damaged", grid={"sparsity": [0.5]}), tmp_path / "out"
    records = api.sweep(path, out)
    broken = out / "cells" / f"{records[1]['id']}.json"
    broken.write_text("{")
    assert "is damaged" in refused(path, out)
    broken.unlink()
    assert api.sweep(path, out)[1]["scores"] == records[1]["scores"]
    answers = broken.with_suffix(".jsonl")
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:-1]))
    assert f"has {len(lines) - 1} of {len(lines)} answers" in refused(path, out)
    answers.write_text("".join(lines))
    (out / "sweep.json").write_text("[")
    assert "is damaged" in refused(path, out)


def test_a_grid_may_grow_and_a_finished_sweep_runs_nothing(home, tmp_path):
    api.sweep(recipe(home, "grow", grid={"sparsity": [0.5]}), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    records = api.sweep(recipe(home, "grow", grid={"sparsity": [0.5, 0.6]}), tmp_path / "out")
    assert [r["label"] for r in records] == ["dense", "50%, wanda", "60%, wanda"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def refused(path, out, *changes):
    with pytest.raises(SparsightError) as error:
        api.sweep(path, out, changes=changes)
    return str(error.value)


def test_a_folder_of_something_else_is_left_alone(home, tmp_path):
    path = recipe(home, "other", grid={"sparsity": [0.5]})
    out = tmp_path / "out"
    api.sweep(path, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert "another model" in refused(path, out, "model=demo:instructblip")
    assert "another held-out" in refused(path, out, "held_out=" + str(home / "train"))
    assert "another data" in refused(path, out, "data=" + str(home / "test"))
    assert "another evaluate" in refused(path, out, "evaluate.max_new_tokens=3")
    assert "another family" in refused(path, out, "family='vision=model.vision_tower,language=model.language_model'")
    with locked(out):
        assert "is writing to it" in refused(path, out)
    page = (out / "report.html").read_text()
    (out / "report.html").write_text("my own")
    assert "move it away" in refused(path, out)
    (out / "report.html").write_text(page)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert "is no folder of a sweep" in refused(path, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert "held_out is missing" in refused(path, tmp_path / "none", "held_out=null")
    assert "out of reach" in refused(path, tmp_path / "none", "grid={sparsity: [0.999], policy: sensitivity}", "seeds=[0]")
    assert not (tmp_path / "none").exists()


def test_another_processor_is_another_model(home, tmp_path):
    model = shutil.copytree(home / "model", tmp_path / "model")
    path = recipe(home, "processor", model=str(model), grid={"sparsity": [0.5]})
    api.sweep(path, tmp_path / "out")
    config = next(p for p in (model / "processor_config.json", model / "preprocessor_config.json") if p.is_file())
    config.write_text(config.read_text().replace("image_mean", "image_means"))
    assert "another model" in refused(path, tmp_path / "out")


def test_a_pruned_model_and_a_place_that_cannot_be_are_refused(home, tmp_path):
    path = recipe(home, "sparse", grid={"sparsity": [0.5]})
    api.prune(home / "model", tmp_path / "sparse", method="magnitude", sparsity=0.5)
    assert "is pruned already" in refused(path, tmp_path / "out", f"model={tmp_path / 'sparse'}")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(path, tmp_path / "file" / "out")


def test_an_interrupted_restoration_goes_on_within_its_cell(home, tmp_path):
    restore = {"steps": 6, "batch_size": 2, "save_every": 2}
    path = recipe(home, "restored", grid={"sparsity": [0.5], "restore": [restore]})
    whole = api.sweep(path, tmp_path / "whole")
    seen = []

    def stop(note, done, total):
        seen.append(note)
        if note.endswith(": 5 of 6"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        api.sweep(path, tmp_path / "out", progress=stop)
    seen.clear()
    again = api.sweep(path, tmp_path / "out", progress=lambda note, done, total: seen.append(note))
    assert not any(note.endswith(": 2 of 6") for note in seen)
    assert any(note.endswith(": 6 of 6") for note in seen)
    assert [(r["scores"], r["verified"]) for r in again] == [(r["scores"], r["verified"]) for r in whole]

    def late(note, done, total):
        if note.startswith("evaluate: 50%, wanda + "):  # written, and not yet scored
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        api.sweep(path, tmp_path / "late", progress=late)
    again = api.sweep(path, tmp_path / "late")
    assert [(r["scores"], r["verified"]) for r in again] == [(r["scores"], r["verified"]) for r in whole]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["grid=[]"], "nothing to sweep"),
        (["grid.sparsity=[1.2]"], "1.2 is not a sparsity"),
        (["jobs=3"], "unknown key 'jobs'"),
    ],
)
def test_what_cannot_be_swept(changes, says, home, tmp_path):
    assert says in refused(recipe(home, "line", grid={"sparsity": [0.5]}), tmp_path / "out", *changes)
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_one_line_and_exits_with_2(home, run, tmp_path):
    code, out, err = run("sweep", recipe(home, "line", grid={"sparsity": [0.5]}), "out", "grid.sparsity=[]")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is an empty list" in err
    assert not (tmp_path / "out").exists()
