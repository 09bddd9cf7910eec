"""Write a pruned model as an ordinary `save_pretrained` folder, and the record beside it; all of it or nothing.

Beside the weights lie `recipe.yaml` (every setting, resolved), `sparsity.json` (per layer: component, pattern, asked, got,
hashes), `metrics.json` (what was measured) and a model card. `config.json` never gets a `sparsity_config`: vLLM refuses
to load such a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from sparsight.checkpoint.card import model_card
from sparsight.checkpoint.parts import PartFiles
from sparsight.checkpoint.unfinished import parents
from sparsight.errors import NotWritten, SparsightError, first_line
from sparsight.files import check_output, make_beside, read_json, set_modes, with_home, without_home
from sparsight.masks.bits import mask_hash, weight_hash
from sparsight.masks.matrix import count_zeros
from sparsight.masks.pattern import Pattern
from sparsight.model.anatomy import SPARSE_FROM, Anatomy, anatomy
from sparsight.model.families import Family
from sparsight.model.load import quiet
from sparsight.packing.shards import SINGLE

FORMAT = 1
SETTING_FILES = (  # of a model and its processor: what they are made from beside the weights
    "*config.json", "*processor*.json", "*token*.json", "vocab*", "merges.txt", "*.model", "chat_template*",
    "qformer_tokenizer/*",
)  # fmt: skip
LAYER_FACTS = {"component", "block", "shape", "dtype", "pattern", "asked", "got", "zeros", "mask", "weight"}


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
        zeros = count_zeros(W)
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
    """Read `sparsity.json`; None if the folder has none. **Raises** `SparsightError` for a damaged one."""
    path = Path(folder) / "sparsity.json"
    record = _read(path)
    if record is None:
        return None
    try:
        if record["format"] != FORMAT:
            raise SparsightError(f"{path}: format {record['format']} is not {FORMAT}; use the version that wrote it")
        for entry in record["layers"].values():
            missing = LAYER_FACTS - set(entry)
            if missing:
                raise KeyError(f"a layer without {', '.join(sorted(missing))}")
            _pattern(entry["pattern"])
            if not all(isinstance(n, int) for n in (entry["zeros"], *entry["shape"])) or not hasattr(torch, entry["dtype"]):
                raise KeyError("a layer with values of other kinds")
        if not record["layers"]:
            raise KeyError("no layers")
        return {key: record[key] for key in ("base_model", "method", "mask_only", "family", "layers")} | record
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SparsightError(f"{path}: is damaged ({first_line(error)}); write the folder again") from error


def _read(path: Path) -> Any:
    """Parse a JSON or YAML file beside the weights; None if it is not there."""
    try:
        there = path.is_file()
    except OSError:  # a name too long to be a file's
        return None
    if not there:
        return None
    then = "delete it, or write the folder again"
    if path.suffix == ".json":
        return with_home(read_json(path, then))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict | None):
            raise ValueError(f"holds a {type(content).__name__}")
        return with_home(content)
    except OSError as error:
        raise SparsightError(f"{path}: cannot be read ({first_line(error)}); {then}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise SparsightError(f"{path}: is damaged ({first_line(error)}); {then}") from error


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """Read `metrics.json`; empty if there is none."""
    return _read(Path(folder) / "metrics.json") or {}


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """Read `recipe.yaml`; empty if there is none."""
    return _read(Path(folder) / "recipe.yaml") or {}


def identity(model: str | Path | None) -> str | None:
    """What tells one state of a model's folder from another: its record, which has hashes, or its files' sizes and times.

    None for a name on the hub.
    """
    if model is None or not Path(model).is_dir():
        return None
    record = Path(model) / "sparsity.json"
    if record.is_file():
        return hashlib.blake2b(record.read_bytes(), digest_size=16).hexdigest()
    files = sorted(Path(model).glob("*.safetensors"))
    return " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def source_of(model: str | Path | None) -> str | None:
    """What tells one state of a model's folder from another as the source of work: its weights, configuration, processor.

    None for a name on the hub.
    """
    weights = identity(model)
    if weights is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted({file for pattern in SETTING_FILES for file in Path(str(model)).glob(pattern)}):
        digest.update(f"{file.relative_to(str(model))} ".encode() + file.read_bytes())
    return f"{weights} {digest.hexdigest()}"


def plan_of_zeros(anatomy: Anatomy) -> dict[str, Pattern]:
    """The plan of a model without a record, read from the zeros of its sparse layers."""
    plan = {}
    for layer in anatomy.layers:
        W = layer.weight
        zeros = count_zeros(W)
        if zeros >= SPARSE_FROM * W.numel():
            plan[layer.name] = Pattern("tensor", zeros / W.numel())
    return plan


def read_plan(record: Mapping[str, Any] | None) -> dict[str, Pattern]:
    """The plan that a `sparsity.json` was written from; empty without one."""
    if record is None:
        return {}
    return {name: _pattern(entry["pattern"]) for name, entry in record["layers"].items()}


def _pattern(text: str) -> Pattern:
    kind, _, sparsity = text.partition(" ")
    return Pattern(kind, float(sparsity)) if sparsity else Pattern.parse(kind)


def read_anatomy(model: Any, record: Mapping[str, Any] | None) -> Anatomy:
    """Take a saved model apart with the family it was pruned with."""
    return anatomy(model, family_of(record))


def family_of(record: Mapping[str, Any] | None, family: str | None = None) -> Family | None:
    """The family that settings name, else the one on record; None where the table knows the model."""
    family = family or (record or {}).get("family")
    return Family.parse(family) if family else None


@contextlib.contextmanager
def atomic_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into that takes the place of `folder` once the block ends without an error.

    On any error, a full disk among them, it is deleted and `folder` is as it was. **Raises** `NotWritten` for a full disk.
    """
    out = check_output(folder, overwrite)
    try:
        with parents(out):
            beside = make_beside(out)
            try:
                yield beside
                set_modes(beside)
                _take_place(beside, out)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk into an error of its own
        raise NotWritten(f"{out}: could not be written ({error})") from error


def _take_place(new: Path, out: Path) -> None:
    """Rename `new` to `out`; an old `out` is moved away first, deleted last, and put back if anything goes wrong."""
    if not out.exists():
        new.rename(out)
        return
    old = make_beside(out)
    try:
        out.rename(old / "folder")
        new.rename(out)
    except BaseException:
        if (old / "folder").exists() and not out.exists():
            (old / "folder").rename(out)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_model(model: Any, processor: Any, record: Record, folder: Path, weights: PartFiles | None = None) -> None:
    """Write model, processor and record into `folder`, which is there and empty (see `atomic_folder`).

    `weights` are files that the model's weights are in already.
    """
    with quiet():
        model.save_pretrained(folder, **({} if weights is None else {"state_dict": {}}))
    if weights is not None:
        (folder / SINGLE).unlink(missing_ok=True)
    dtypes = Counter(entry["dtype"] for entry in record.sparsity["layers"].values())
    _name_dtype(folder / "config.json", dtypes.most_common(1)[0][0])
    if processor is not None:
        processor.save_pretrained(folder)
    files = {
        "sparsity.json": json.dumps(without_home(record.sparsity), indent=1) + "\n",
        "metrics.json": json.dumps(without_home(record.metrics), indent=1) + "\n",
        "recipe.yaml": yaml.safe_dump(without_home(record.recipe), sort_keys=False),
        "README.md": model_card(record.sparsity, record.recipe),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if weights is not None:  # last, since a file system without links loses the others by it
        weights.put_into(folder)


def _name_dtype(config: Path, dtype: str) -> None:
    """Write the dtype of most layers into the configuration.

    A model that keeps a few parameters in float32 (T5 and BLIP in float16) is saved as if all of it were float32, and
    would come back with every layer in another dtype.
    """
    content = json.loads(config.read_text(encoding="utf-8"))
    if content.get("dtype") not in (None, dtype):
        content["dtype"] = dtype
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
