"""Every command and every script in the guides is executed, with a tiny local model where a hub name stands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparsight.cli import app as cli

import zoo
from shapes import OFFICIAL

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
HUB = "Salesforce/instructblip-flan-t5-xl"
LESS = {"--steps 200": "--steps 2", "--steps 100": "--steps 2", "--samples 64": "--samples 2"}
LESS |= {"--samples 50": "--samples 2", "--sparsity 0.7": "--sparsity 0.7 --samples 2"}
LESS |= {
    "fixed-sum.yaml fixed-sum": "fixed-sum.yaml fixed-sum seeds=[0] evaluate.samples=4 evaluate.max_new_tokens=8 "
    "prune.samples=8 'grid={sparsity: {sum: 1.0, vision: [0.4]}}'"
}
LESS |= {"seeds=[0,1,2] --jobs 2": "seeds=[0]", "seeds: [0, 1]": "seeds: [0]", "[0.3, 0.5, 0.7]": "[0.5]"}
LESS |= {"at: [0.3, 0.5]": "at: [0.5]", '"2:4", "4:8"': '"2:4"'}


def blocks(text):
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def desk(zoo_folder, tmp_path, monkeypatch):
    """A folder with the data that the guides speak of, and the tiny model under the hub's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop").mkdir()
    for i, image in enumerate(zoo.images(2)):
        image.save(tmp_path / "shop" / f"{i}.png")
    lines = next(block for kind, block in blocks((ROOT / "docs" / "guides" / "data.md").read_text()) if kind == "json")
    for name in ("mine.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text(lines)
    shutil.copytree(zoo_folder("instructblip-t5"), tmp_path / HUB)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for task in ("vqav2", "gqa"):
        OFFICIAL[task](tmp_path / task)
    return tmp_path


def less(text):
    """The same with less work."""
    for words, fewer in LESS.items():
        text = text.replace(words, fewer)
    return re.sub(r"steps: \d+", "steps: 2", text)


@pytest.mark.filterwarnings("ignore:.*every packed layer is so small:sparsight.errors.Notice")  # those of a tiny model
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_does_what_it_says(guide, desk, monkeypatch, capsys):
    for kind, block in blocks(guide.read_text()):
        if kind == "yaml":
            name = "grid.yaml" if "grid" in yaml.safe_load(block) else "recipe.yaml"
            (desk / name).write_text(less(block))
        elif kind == "python":
            exec(block, {})
        elif kind == "bash":
            for line in less(block).splitlines():
                monkeypatch.setattr(sys, "argv", shlex.split(line))
                with pytest.raises(SystemExit) as stop:
                    cli.main()
                assert stop.value.code == 0, (line, capsys.readouterr())


def test_the_pages_are_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", ROOT / "docs", tmp_path / "pages"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "pages" / "reference.html").read_text()
    for verb in (
        "prune",
        "restore",
        "evaluate",
        "verify",
        "run",
        "sweep",
        "search",
        "report",
        "estimate",
    ):
        assert f'id="sparsight.api.{verb}"' in reference
    for function in ("save", "sparse_lora", "merge"):
        assert f'id="sparsight.{function}"' in reference
    assert (tmp_path / "pages" / "searchindex.js").is_file()


def test_every_guide_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    for guide in GUIDES:
        assert f"guides/{guide.stem}" in index
