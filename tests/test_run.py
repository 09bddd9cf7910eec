"""A recipe, run as a user runs it; and every recipe that comes with the project."""

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
from transformers import AutoModelForMultimodalLM

from sparsight import SparsightError, api, recipe
from sparsight.data import read, sources
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.errors import Interrupted
from sparsight.reporting.runs import read_folder
from sparsight.sweeps.grid import cells
from sparsight.sweeps.sweep import EXTRA

import zoo
from zoo import digest

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


def test_a_recipe_runs(run, home, tmp_path, monkeypatch):
    """With one load per set of weights, and one parse per sample."""
    loads, parses = [], []
    from_pretrained, parse = AutoModelForMultimodalLM.from_pretrained, sources.parse

    def count_load(path, **settings):
        loads.append(Path(path).name)
        return from_pretrained(path, **settings)

    monkeypatch.setattr(AutoModelForMultimodalLM, "from_pretrained", staticmethod(count_load))
    monkeypatch.setattr(sources, "parse", lambda *record: parses.append(record) or parse(*record))
    code, told, said = run("run", home / "r.yaml", tmp_path / "out", *SMALL, "--quiet")
    assert code == 0, said
    assert loads == ["llava", "llava", "restored"]  # the dense one, which is pruned in memory; its teacher; the files' own
    samples = len(parses)
    assert samples == len(read(home / "test")) + len(read(home / "train"))
    for words in ("dense", "pruned", "verified", "no zero of", "report.html"):
        assert words in told
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


@pytest.mark.parametrize(
    "stages",
    [
        [("prune", {"sparsity": 0.5, "samples": 4}), ("restore", {"steps": 2, "batch_size": 4, "held_out": 4})],
        [("prune", {"sparsity": 0.4, "method": "magnitude", "pattern": "tensor"})],
        [("prune", {"sparsity": 0.3, "samples": 4}), ("prune", {"sparsity": 0.6, "samples": 6, "policy": "owl"})],
        [("search", {"sparsity": 0.5, "samples": 4, "over": "components", "max_new_tokens": 2, "held_out_samples": 4}),
         ("prune", {"sparsity": 0.6, "samples": 4}), ("restore", {"steps": 2, "batch_size": 4, "kl": 0})],
    ],
    ids=["restored", "without data", "twice", "after a search"],
)  # fmt: skip
def test_the_recipe_beside_the_weights_makes_the_same_bytes(stages, home, zoo_folder, tmp_path):
    model = zoo_folder("llava")
    for number, (verb, settings) in enumerate(stages):
        words = {} if settings.get("method") == "magnitude" else {"data": home / "train"}
        words |= {"held_out": home / "test"} if verb == "search" else {}
        getattr(api, verb)(model, tmp_path / f"m{number}", **words, **settings)
        model = tmp_path / f"m{number}"
    done = api.run(model / "recipe.yaml", tmp_path / "again")
    last = tmp_path / "again" / ("restored" if stages[-1][0] == "restore" else "pruned")
    assert done["verify"]["differences"] == {}
    assert digest(last) == digest(model)
    names = ("sparsity.json", "recipe.yaml")
    assert [(last / name).read_text() for name in names] == [(model / name).read_text() for name in names]
    made = [settings for verb, settings in stages if verb in ("prune", "search")]
    cell = read_folder(model).cell
    assert cell["sparsity"] == pytest.approx(dict.fromkeys(("vision", "language"), made[-1]["sparsity"]), abs=0.01)
    assert cell["method"] == made[-1].get("method", "wanda")
    assert cell.get("prunings", 1) == max(1, sum(verb == "prune" for verb, _ in stages))


def test_a_recipe_beside_weights_refuses_other_samples(home, zoo_folder, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "out", data=home / "train", samples=4)
    with pytest.raises(SparsightError, match="holds other samples than those that the recipe was written from"):
        api.run(tmp_path / "out/recipe.yaml", tmp_path / "again", changes=[f"data={home / 'test'}"])
    assert not (tmp_path / "again").exists()


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
        (["search=5"], "search is 5 and not a mapping"),
        (["search.sparsty=0.5"], "search: unknown key 'sparsty'; did you mean sparsity?"),
        (["search.sparsity=vision=0.5", "search.over=components"], "one component alone has nothing to share with"),
        (["search.sparsity=0.5", "data=null", "evaluate=null"], "data is missing"),
        (["search.sparsity=0.5", "held_out=null", "evaluate=null"], "held_out is missing"),
        (["search=[{sparsity: 0.5}]"], "search is [{'sparsity': 0.5}] and not a mapping"),
        (["evaluate=[{beams: 2}]"], "evaluate is [{'beams': 2}] and not a mapping"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_left(changes, says, home, tmp_path):
    with pytest.raises(SparsightError) as error:
        api.run(home / "r.yaml", tmp_path / "out", changes=[*SMALL, *changes])
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_one_line(home, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsightError, match="cannot be written to"):
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
    "qwen3-vl-8b": "qwen3-vl", "gemma-4-e4b": "gemma4", "internvl3-8b": "internvl", "llama-3.2-11b-vision": "mllama",
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
