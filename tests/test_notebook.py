"""The notebook is executed, cell by cell in one namespace and with fewer steps; the cell that pushes to the hub is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sparsight

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
SHOWN_ONLY = "skip-execution"
LESS = {"STEPS = 60": "STEPS = 4"}


def source(cell):
    return "".join(cell["source"])


def shown_only(cell):
    return SHOWN_ONLY in cell["metadata"].get("tags", [])


def test_the_notebook_prunes_restores_and_saves_a_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in CELLS:
        text = source(cell)
        for words, fewer in LESS.items():
            text = text.replace(words, fewer)
        if not shown_only(cell):
            exec(compile(text, cell["id"], "exec"), names)
    assert names["STEPS"] == 4
    dense, pruned, restored = (names["answers"][state] for state in ("dense", "pruned", "restored"))
    assert len(dense) == len(names["held_out"])
    assert dense != pruned != restored
    proof = sparsight.verify("sparse-llava", against=names["model"])
    assert proof["differences"] == {}
    assert proof["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert "layers that lost a zero: 0" in capsys.readouterr().out


def test_only_the_push_to_the_hub_is_shown_and_not_run():
    (push,) = (cell for cell in CELLS if shown_only(cell))
    assert "upload_folder" in source(push)
    exec(source(push), {})  # whoever runs all cells pushes nothing: a repository has to be named first


def test_the_notebook_is_stored_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
