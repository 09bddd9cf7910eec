"""README is executed: every block, with a tiny local model where a hub name stands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsight.cli import app as cli

import zoo

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
HUB = "Salesforce/instructblip-flan-t5-xl"


def blocks(language):
    return [block for kind, block in BLOCKS if kind == language]


@pytest.fixture
def desk(zoo_folder, tmp_path, monkeypatch):
    """A folder with the data that README describes, and the tiny model under the hub's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop").mkdir()
    for i, image in enumerate(zoo.images(2)):
        image.save(tmp_path / "shop" / f"{i}.png")
    for name in ("mine.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text(blocks("jsonl")[0])
    shutil.copytree(zoo_folder("instructblip-t5"), tmp_path / HUB)
    return tmp_path


def test_every_block_is_known():
    assert [kind for kind, _ in BLOCKS] == ["bash", "bash", "jsonl", "python", "python", "python"]


def test_the_two_commands():
    """make is asked what it would do: setting up is what CI does around this test."""
    lines = [line.split("#")[0].strip() for line in blocks("bash")[0].splitlines()]
    assert lines == ["make demo", "make test"]
    for line, does in zip(lines, ("sparsight demo", "pytest"), strict=True):
        done = subprocess.run([*line.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert does in done.stdout


def test_a_real_model_in_five_lines(desk, monkeypatch, capsys):
    lines = blocks("bash")[1].splitlines()
    assert len(lines) == 5
    for line in lines:
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0, (line, capsys.readouterr())
    assert (desk / "restored" / "model.safetensors").is_file()
    assert len((desk / "answers.jsonl").read_text().splitlines()) == 4


def test_python(desk, capsys):
    for block in blocks("python"):
        scope = {}
        exec(block.replace("steps=200", "steps=2"), scope)
    assert {"sparse", "restored", "mine-sparse", "mine"} <= {p.name for p in desk.iterdir()}


@pytest.mark.parametrize("row", ["methods", "then", "policies", "evaluation"])
def test_the_tables_of_methods_and_policies_are_the_tables(row):
    from sparsight.allocation.plan import POLICIES
    from sparsight.calibration.tokens import TOKENS
    from sparsight.evaluation.metrics import METRICS
    from sparsight.pruning.methods import METHODS, REFINES, UPDATES

    known = {"methods": {*METHODS}, "then": {*REFINES, *UPDATES, *TOKENS} - {"all"}, "policies": {*POLICIES}}
    known["evaluation"] = {*METRICS}
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| {row}"))
    named = {word.split()[-1] for word in re.findall(r"`([^`]+)`", line)} - {"EPOCHS", "--permute", "--metrics"}
    assert named == known[row]


def test_the_commands_of_the_one_shot_guide(desk, zoo_folder, monkeypatch, capsys):
    text = (ROOT / "docs" / "one-shot.md").read_text()
    (block,) = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        monkeypatch.setattr(sys, "argv", line.replace("MODEL", str(zoo_folder("instructblip-t5"))).split())
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0, (line, capsys.readouterr())


def test_the_tables_of_the_one_shot_guide_are_the_tables():
    from sparsight.allocation.plan import POLICIES
    from sparsight.calibration.tokens import TOKENS
    from sparsight.pruning.compose import PROPAGATE
    from sparsight.pruning.methods import METHODS, PRESETS, REFINES, UPDATES

    text = (ROOT / "docs" / "one-shot.md").read_text()
    for name in {*POLICIES, *METHODS, *PRESETS, *REFINES, *UPDATES, *TOKENS, *PROPAGATE}:
        assert f"`{name}`" in text, name
