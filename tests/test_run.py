"""The whole road of a recipe, as a user takes it; and every recipe that comes with the project."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sparsight import SparsightError, api, recipe
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.errors import Interrupted
from sparsight.sweeps.grid import cells
from sparsight.sweeps.sweep import EXTRA

import zoo
from test_road import digest

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
COMMAND = [sys.executable, "-m", "sparsight"]
SMALL = ["prune.samples=8", "restore.steps=3", "restore.batch_size=4", "restore.reconstruct=0", "evaluate.samples=8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write(folder / "train", "train", 16, seed=0, questions_per_scene=1)
    write(folder / "test", "test", 6, seed=0)
    text = (ROOT / "recipes" / "demo.yaml").read_text()
    (folder / "r.yaml").write_text(text.replace("demo:train", "train").replace("demo:test", "test"))
    return folder


def test_the_whole_road(home, tmp_path):
    command = [*COMMAND, "run", home / "r.yaml", tmp_path / "out", *SMALL, "--quiet"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("dense", "pruned", "verified", "no zero of", "report.html"):
        assert words in done.stdout
    out = tmp_path / "out"
    assert not api.verify(out / "restored", against=out / "pruned")["differences"]
    page = (out / "report.html").read_text()
    assert "restored" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for name in ("dense", "pruned", "restored"):
        assert len((out / name / "predictions.jsonl").read_text().splitlines()) == 8
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = api.run(home / "r.yaml", out, changes=SMALL)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again["verify"]["differences"] == {}
    with pytest.raises(SparsightError, match="restore="):
        api.run(home / "r.yaml", out, changes=[*SMALL, "restore.steps=4"])


@pytest.mark.slow
def test_killed_anywhere_it_goes_on(home, tmp_path):
    api.run(home / "r.yaml", tmp_path / "whole", changes=[*SMALL, "restore.save_every=1"])
    out = tmp_path / "out"
    command = [*map(str, [*COMMAND, "run", home / "r.yaml", out, *SMALL, "restore.save_every=1", "--quiet"])]
    for there in ("pruned.unfinished", "restored.unfinished"):
        with subprocess.Popen(command, start_new_session=True) as process:
            while process.poll() is None and not (out / there).exists():
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGKILL)
    assert not (out / "restored").exists()
    api.run(home / "r.yaml", out, changes=[*SMALL, "restore.save_every=1"])
    assert digest(out / "pruned") == digest(tmp_path / "whole" / "pruned")
    assert digest(out / "restored") == digest(tmp_path / "whole" / "restored")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["held_out=null"], "held_out is missing"),
        (["prune.sparsity=2"], "2 is not a sparsity"),
        (["prune.methd=wanda"], "did you mean method"),
        (["restore.adapter=lra"], "did you mean lora"),
        (["evaluate.batch_size=0"], "`evaluate.batch_size`: 0"),
        (["model=nowhere"], "nowhere: no such folder"),
        (["data=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_left(changes, says, home, tmp_path):
    with pytest.raises(SparsightError) as error:
        api.run(home / "r.yaml", tmp_path / "out", changes=[*SMALL, *changes])
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_one_line(home, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsightError, match="could not be written to"):
        api.run(home / "r.yaml", tmp_path / "file" / "out", changes=SMALL)


def test_ctrl_c_says_how_to_go_on(home, tmp_path):
    def stop(note, done, total):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command goes on"):
        api.run(home / "r.yaml", tmp_path / "out", changes=SMALL, progress=stop)


def test_a_pruned_model_is_refused_and_null_restores_nothing(home, tmp_path):
    api.prune(MODELS["llava"], tmp_path / "sparse", method="magnitude", sparsity=0.5)
    with pytest.raises(SparsightError, match="is pruned already"):
        api.run(home / "r.yaml", tmp_path / "out", changes=[*SMALL, f"model={tmp_path / 'sparse'}"])
    assert not (tmp_path / "out").exists()
    done = api.run(home / "r.yaml", tmp_path / "out", changes=[*SMALL, "restore=null"])
    assert [Path(run).name for run in done["runs"]] == ["dense", "pruned"]
    begun = (tmp_path / "out" / "pruned" / "model.safetensors").stat().st_mtime_ns
    done = api.run(home / "r.yaml", tmp_path / "out", changes=SMALL)  # what is not begun may still be asked for
    assert [Path(run).name for run in done["runs"]] == ["dense", "pruned", "restored"]
    assert (tmp_path / "out" / "pruned" / "model.safetensors").stat().st_mtime_ns == begun
    with pytest.raises(SparsightError, match="holds a run with restore="):
        api.run(home / "r.yaml", tmp_path / "out", changes=[*SMALL, "restore.kl=0.3"])


def test_a_folder_of_something_else_is_left_alone(home, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(SparsightError, match="is no folder of a run"):
        api.run(home / "r.yaml", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_reads_and_says_how_to_run_it(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    verb = "sweep" if "grid" in yaml.safe_load(path.read_text()) else "run"
    assert any(f"sparsight {verb} {path.relative_to(ROOT).as_posix()}" in line for line in header)
    assert any(line.startswith("# Machine:") for line in header)
    found = recipe.read(path, extra=EXTRA)
    if verb == "sweep":
        assert len(cells(found)) > 1
    json.dumps(found)


CLASSES = {
    "instructblip-flan-t5-xl": "instructblip-t5", "instructblip-vicuna-7b": "instructblip-llama", "llava-1.5-7b": "llava",
    "qwen2.5-vl-7b": "qwen2.5-vl", "gemma-3-4b": "gemma3", "smolvlm-2.2b": "smolvlm",
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_a_recipe_for_real_weights_says_what_was_foretold(name):
    header = " ".join(line for line in next(p for p in RECIPES if p.stem == name).read_text().splitlines() if line[0] == "#")
    with (ROOT / "benchmarks" / "recipes.csv").open() as file:
        told = {row["stage"]: row for row in csv.DictReader(file) if row["recipe"] == name}
    for stage in ("prune", "restore", "evaluate"):
        assert f"{stage} {told[stage]['peak GB']} GB and {float(told[stage]['PFLOPs in all']):,.0f} PFLOPs" in header


@pytest.mark.parametrize("name", CLASSES)
def test_a_recipe_for_real_weights_runs_on_a_tiny_model_of_its_class(name, zoo_folder, scenes, tmp_path):
    if CLASSES[name] in zoo.NEEDS_TORCHVISION:
        pytest.importorskip("torchvision")
    path = next(path for path in RECIPES if path.stem == name)
    small = [
        f"model={zoo_folder(CLASSES[name])}",
        f"data={scenes}",
        f"held_out={scenes}",
        "prune.samples=4",
        "dtype=float32",
    ]
    small += ["evaluate.samples=2", "evaluate.max_new_tokens=2", "evaluate.beams=1"]
    if "paper" in path.parts:
        restore = "{steps: 1, batch_size: 2, scheduler: constant, warmup: 0.0, gradient_checkpointing: true}"
        text = yaml.safe_load(path.read_text())
        patterns = len(text["grid"][0]["sparsity"]) + 2 * 3
        assert len(cells(recipe.read(path, small, extra=EXTRA))) == 1 + 2 * patterns
        records = api.sweep(path, tmp_path / "out", changes=[*small, f"grid={{pattern: '2:4', restore: [null, {restore}]}}"])
        assert [record["verified"] for record in records] == [True] * 3
    else:
        done = api.run(path, tmp_path / "out", changes=[*small, "restore.steps=1", "restore.batch_size=2"])
        assert done["verify"]["differences"] == {}
        assert done["verify"]["zeros"] > 0
