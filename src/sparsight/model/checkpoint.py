"""Write a pruned model as an ordinary `save_pretrained` folder, and the record beside it; all of it or nothing.

Beside the weights lie `recipe.yaml` (every setting, resolved), `sparsity.json` (per layer: component, pattern, asked, got,
hashes), `metrics.json` (what was measured) and a model card. `config.json` never gets a `sparsity_config`: vLLM refuses
to load such a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, anatomy
from sparsight.model.card import model_card
from sparsight.model.families import Family
from sparsight.model.load import quiet
from sparsight.model.masks import mask_hash, weight_hash
from sparsight.model.unfinished import parents
from sparsight.plan.pattern import Pattern

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """What is written beside the weights."""

    sparsity: dict[str, Any]
    metrics: dict[str, Any]
    recipe: dict[str, Any]


@torch.no_grad()
def sparsity_record(
    anatomy: Anatomy,
    plan: Mapping[str, Pattern],
    *,
    base_model: str,
    method: str,
    mask_only: bool,
    family: Family | None = None,
) -> dict[str, Any]:
    """Count every zero of every layer and hash the masks: the content of `sparsity.json`.

    `family` is named where the table of families does not know the model.
    """
    layers = {}
    for layer in anatomy.layers:
        if layer.name not in plan:
            continue
        W = layer.weight
        zeros = int((W == 0).sum())
        layers[layer.name] = {
            "component": layer.component,
            "block": layer.block,
            "shape": list(layer.shape),
            "dtype": str(W.dtype).removeprefix("torch."),
            "pattern": str(plan[layer.name]),
            "asked": plan[layer.name].zeros(layer.shape) / W.numel(),
            "got": zeros / W.numel(),
            "zeros": zeros,
            "mask": mask_hash(W),
            "weight": weight_hash(W),
        }
    return {
        "format": FORMAT,
        "base_model": base_model,
        "method": method,
        "mask_only": mask_only,
        "family": str(family) if family else None,
        "parameters": anatomy.parameters,
        "layers": layers,
    }


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """Read `sparsity.json`; None if the folder has none."""
    path = Path(folder) / "sparsity.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        if record["format"] != FORMAT:
            raise SparsightError(f"{path}: format {record['format']} is not {FORMAT}; use the version that wrote it")
        return {**record, "layers": dict(record["layers"])}
    except (ValueError, KeyError, TypeError) as error:
        raise SparsightError(f"{path}: is damaged ({error}); write the folder again") from error


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """Read `metrics.json`; empty if there is none."""
    path = Path(folder) / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """Read `recipe.yaml`; empty if there is none."""
    path = Path(folder) / "recipe.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def found_plan(anatomy: Anatomy, names: set[str]) -> dict[str, Pattern]:
    """The plan of a folder without a record, read from the zeros of the named layers."""
    layers = [layer for layer in anatomy.layers if layer.name in names]
    return {layer.name: Pattern.tensor(int((layer.weight == 0).sum()) / layer.weight.numel()) for layer in layers}


def read_plan(record: Mapping[str, Any]) -> dict[str, Pattern]:
    """The plan that a `sparsity.json` was written from."""
    return {name: _pattern(entry["pattern"]) for name, entry in record["layers"].items()}


def _pattern(text: str) -> Pattern:
    kind, _, sparsity = text.partition(" ")
    return Pattern.parse(kind, float(sparsity or 0.5))


def read_anatomy(model: Any, record: Mapping[str, Any] | None) -> Anatomy:
    """Take a saved model apart with the family it was pruned with."""
    return anatomy(model, recorded_family(record))


def recorded_family(record: Mapping[str, Any] | None) -> Family | None:
    """The family that a user had to name with `--family`; None where the table knows the model."""
    return Family.parse(record["family"]) if record and record["family"] else None


def check_output(folder: str | Path, overwrite: bool = False) -> Path:
    """Refuse an output folder that would lose something; touch nothing."""
    out = Path(folder)
    if out.is_file():
        raise SparsightError(f"{out}: is a file; give a folder to write to")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise SparsightError(f"{out}: exists and is not empty; choose another folder, or add --overwrite")
        if not (out / "config.json").is_file():
            raise SparsightError(f"{out}: is not a model folder, so --overwrite does not delete it; choose another")
    return out


@contextlib.contextmanager
def atomic_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into that takes the place of `folder` once the block ends without an error.

    On any error, a full disk among them, it is deleted and `folder` is as it was.
    """
    out = check_output(folder, overwrite)
    try:
        with parents(out):
            beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
            try:
                yield beside
                beside.chmod(0o755)
                _take_place(beside, out)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk into an error of its own
        raise SparsightError(f"{out}: could not be written ({error}); nothing was left behind") from error


def _take_place(new: Path, out: Path) -> None:
    """Rename `new` to `out`; an old `out` is deleted after it has been moved away."""
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    out.rename(old / "folder")
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def save(model: Any, processor: Any, record: Record, folder: Path) -> None:
    """Write model, processor and record into `folder`, which is there and empty (see `atomic_folder`)."""
    with quiet():
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "sparsity.json").write_text(json.dumps(record.sparsity, indent=1) + "\n")
    (folder / "metrics.json").write_text(json.dumps(record.metrics, indent=1) + "\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record.recipe, sort_keys=False))
    (folder / "README.md").write_text(model_card(record.sparsity, record.metrics, record.recipe))
