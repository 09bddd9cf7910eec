"""What a user of the package gets beside the code: recipes by name, `demo:` names, lines about what is not installed."""

import importlib.util
import json
import re
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path

import pytest
import yaml

import sparsight
from sparsight import SparsightError, api, recipe
from sparsight.demo import MODELS
from sparsight.errors import Notice

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def without(monkeypatch):
    """Give `without(name)`: a package is not installed any more."""
    inner = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in names else inner(name, *more))

    return hide


@pytest.mark.parametrize("missing", [("sklearn",), ("matplotlib",), ("sklearn", "matplotlib")])
def test_the_demo_says_at_once_what_it_needs(missing, without, run, tmp_path):
    without(*missing)
    began = time.perf_counter()
    code, _, err = run("demo", "out")
    names = " and ".join({"sklearn": "scikit-learn"}.get(name, name) for name in missing)
    assert (code, err) == (2, f"sparsight: the demo needs {names}: pip install 'sparsight[demo]'\n")
    assert time.perf_counter() - began < 1
    assert not (tmp_path / "out").exists()


def test_a_run_says_at_once_what_it_needs(without, run, tmp_path, monkeypatch):
    without("matplotlib")
    code, _, err = run("run", "demo", "out", "data=demo:train")
    assert (code, "the report of a run needs matplotlib: pip install 'sparsight[report]'" in err) == (2, True)
    without("sklearn")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, _, err = run("run", "demo", "out")
    assert (code, "demo:train needs scikit-learn: pip install 'sparsight[demo]'" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_a_page_says_so(without, scenes, zoo_folder, tmp_path):
    grid = {"model": str(zoo_folder("llava")), "data": str(scenes), "held_out": str(scenes), "prune": {"samples": 4}}
    grid |= {"evaluate": {"samples": 2, "max_new_tokens": 1}, "grid": {"sparsity": [0.5]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(grid))
    without("matplotlib")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        api.sweep(tmp_path / "sweep.yaml", tmp_path / "out")
    (line,) = [str(each.message) for each in seen if each.category is Notice]
    assert line.startswith("the page and the figures need matplotlib, so none are written: pip install 'sparsight[report]'")
    assert not (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "results.csv").is_file()


def test_recipes_go_by_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {str(path.relative_to(recipe.SHIPPED).with_suffix("")) for path in recipe.SHIPPED.rglob("*.yaml")}
    assert {"llava-1.5-7b", "demo", "paper/instructblip-flan-t5-xl", "figures/fixed-sum"} <= names
    for name in names:
        assert recipe.find_recipe(name).is_file()
    assert recipe.read("llava-1.5-7b")["model"] == "llava-hf/llava-1.5-7b-hf"
    code, _, err = run("run", "lava-1.5-7b", "out")
    assert (code, "is no file and no recipe of the package; did you mean llava-1.5-7b?" in err) == (2, True)
    Path("demo").write_text("model: mine\ndata: x\n")  # a file of one's own comes first
    assert recipe.find_recipe("demo") == Path("demo")
    with pytest.raises(SparsightError, match=re.escape("nothing.yaml: cannot be read")):
        recipe.read("nothing.yaml")


def test_every_shipped_file_is_named_in_the_wheel():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["sparsight"]
    package = Path(sparsight.__file__).parent
    named = {path for pattern in patterns for path in package.glob(pattern)}
    data = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so", ".o")]
    assert [path for path in data if path not in named and "__pycache__" not in path.parts] == []


def test_demo_names_in_every_verb(run, tmp_path):
    few = ("--samples", 2, "--batch-size", 2)
    assert run("inspect", "demo:llava")[0] == 0
    assert run("plan", "demo:llava", "--data", "demo:train", "--policy", "owl", *few)[0] == 0
    assert run("plan", "demo:llava", "--data", "demo:train", "--cost")[0] == 0
    assert run("prune", "demo:llava", "sparse", "--data", "demo:train", *few)[0] == 0
    restored = run(
        "restore", "sparse", "restored", "--data", "demo:train", "--teacher", "demo:llava", "--steps", 1, "--batch-size", 2,
        "--samples", 2,
    )  # fmt: skip
    assert restored[0] == 0
    assert run("eval", "demo:llava", "--data", "demo:test", "--samples", 2, "--max-new-tokens", 1)[0] == 0
    assert run("verify", "restored", "--against", "sparse")[0] == 0
    record = json.loads((tmp_path / "sparse" / "sparsity.json").read_text())
    assert record["base_model"] == str(MODELS["llava"])
    code, _, err = run("prune", "demo:lava", "x", "--data", "demo:train")
    assert (code, "model: there is no 'demo:lava'; did you mean llava?" in err) == (2, True)
    for verb, why in (("pack", "holds no weight with zeros"), ("unpack", "is not packed"), ("bench", "with zeros to time")):
        code, _, err = run(verb, "demo:llava", *(["other"] if verb != "bench" else []))
        assert code == 2
        assert why in err
    code, _, err = run("eval", "demo:llava", "--data", "demo:exam")
    assert (code, "data: there is no 'demo:exam'" in err) == (2, True)


def test_predictions_are_there_even_where_nobody_reads_the_output(zoo_folder, scenes, tmp_path):
    """The table goes into a pipe that is closed at once; the answers are in their file all the same."""
    words = ["eval", str(zoo_folder("llava")), "--data", str(scenes), "--samples", "2", "--max-new-tokens", "1", "--json"]
    command = [sys.executable, "-m", "sparsight", *words, "--predictions", str(tmp_path / "answers.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.close()
    process.wait()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_completion_is_offered(run):
    code, out, _ = run("--help")
    assert (code, "--install-completion" in out) == (0, True)


def test_the_citation_names_this_version():
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert facts["version"] == PROJECT["project"]["version"]
    assert facts["license"] == PROJECT["project"]["license"]
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} == set(form)
        assert all({"type", "attributes"} <= set(field) for field in form["body"])


WITHOUT = """
import importlib.util, sys
inner, missing = importlib.util.find_spec, sys.argv[1].split(",")
importlib.util.find_spec = lambda name, *more: None if name in missing else inner(name, *more)
sys.argv = ["sparsight", *sys.argv[2:]]
from sparsight.cli.app import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("run demo out", "demo:train needs scikit-learn: pip install 'sparsight[demo]'"),
        ("run demo --cost", "demo:train needs scikit-learn: pip install 'sparsight[demo]'"),
        ("sweep figures/fixed-sum out", "demo:train needs scikit-learn: pip install 'sparsight[demo]'"),
        ("prune demo:llava x --data demo:train", "demo:train needs scikit-learn: pip install 'sparsight[demo]'"),
        ("plan demo:llava --data demo:train", "demo:train needs scikit-learn: pip install 'sparsight[demo]'"),
        ("restore own/a b --data demo:train", "demo:train needs scikit-learn: pip install 'sparsight[demo]'"),
        ("search demo:llava x --data demo:train --held-out demo:test", "demo:train needs scikit-learn"),
        ("eval demo:llava --data demo:test", "demo:test needs scikit-learn: pip install 'sparsight[demo]'"),
        ("eval demo:llava --data lmms-lab/VQAv2", "lmms-lab/VQAv2: reading it needs datasets: pip install 'sparsight"),
        ("prune demo:llava x --data my.parquet", "my.parquet: reading it needs datasets: pip install 'sparsight[data]'"),
        ("prune demo:llava x --data imdb", "imdb: reading it needs datasets: pip install 'sparsight[data]'"),
        ("prune demo:llava x --data tables", "tables: reading it needs datasets: pip install 'sparsight[data]'"),
        ("eval demo:llava --task gqa", "gqa: reading it from the Hub needs datasets: pip install 'sparsight[data]'"),
        ("eval demo:llava --task gqa --data tables", "tables: reading it needs datasets: pip install 'sparsight[data]'"),
        ("report tables", "the report needs matplotlib: pip install 'sparsight[report]'"),
        (
            "restore own/a b --data x.jsonl --report-to tensorboard",
            "--report-to: tensorboard needs tensorboardX or tensorboard: pip install tensorboardX",
        ),
        ("prune own/a b --report-to wandb", "--report-to: wandb needs wandb: pip install wandb"),
        ("report x", "x: is not there; give folders that eval --record or sweep has written to"),
        ("run llava-1.5-7b", "--out: is missing; give a folder for the results, or add --cost"),
        ("run llava-1.5-7b --cost", "llava-1.5-7b: data: train.jsonl is not there, and the cost is that of its samples"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_torch_is_imported(words, line, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tables" / "data").mkdir(parents=True)
    (tmp_path / "tables" / "data" / "test.parquet").touch()
    (tmp_path / "x.jsonl").touch()
    missing = "sklearn,matplotlib,datasets,tensorboard,tensorboardX,wandb"
    command = [sys.executable, "-c", WITHOUT, missing, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"sparsight: {line}"), done.stderr
    assert done.stdout == "False\n"


def test_the_cost_of_a_recipe_needs_no_folder(run, zoo_folder, scenes, tmp_path):
    recipe_file = {"model": str(zoo_folder("llava")), "data": str(scenes), "held_out": str(scenes), "prune": {"samples": 4}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_file))
    costs = [
        run("run", "recipe.yaml", "--cost", "--json", *more)
        for more in ((), ("restore={steps: 1, batch_size: 2}",), ("out",))
    ]
    assert [code for code, _, _ in costs] == [0, 0, 0]
    work = [{stage["name"]: sum(stage["flops"].values()) for stage in json.loads(out)["stages"]} for _, out, _ in costs]
    assert work[0] == work[2]
    assert set(work[1]) - set(work[0]) == {"restore"}
    assert not (tmp_path / "out").exists()
