"""A run: one model, how it was made, what it holds and how it scored; read from folders of models and of sweeps."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError
from sparsight.evaluate.record import PICTURES, read_answers, read_evaluation
from sparsight.model.card import component_totals
from sparsight.model.checkpoint import read_metrics, read_recipe, read_record
from sparsight.report.stored import folder_facts, layer_facts

FORMAT = 1
HASHES = {"model_hash": "dense model", "held_out_fingerprint": "fingerprint", "data_fingerprint": "training samples"}
CELL = ("sparsity", "pattern", "method", "refine", "update", "reconstruct", "policy", "restore", "seed")
_NOT_HOW = {"model", "data", "sparse", "teacher", "teacher_mode", "fingerprint", "seed", "batch_size", "dtype", "save_every"}


@dataclass(frozen=True, eq=False)
class Run:
    """One model and what is known of it.

    `cell` says how it was made: "sparsity" asked per component, "pattern", "method" (None for the dense model), "refine",
    "update", "reconstruct", "policy", "restore" (None or settings), "seed", and whatever else tells it from another run.
    `components` has {"layers", "zeros", "parameters"} of the prunable layers; `layers` by name {"component", "block",
    "got", "error"}, the error relative or None. `scores` and `predictions` are those of `evaluate.Result`. `seconds` are
    per stage, and so is `memory`: bytes that the process had held at most by its end. `pictures` is the folder with N.png
    for the first samples.
    """

    id: str
    label: str
    cell: Mapping[str, Any]
    model: str = ""
    components: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parameters: int | None = None
    bytes: int | None = None
    packed_bytes: int | None = None
    scores: tuple[Mapping[str, Any], ...] = ()
    predictions: tuple[Mapping[str, Any], ...] = ()
    skipped: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    curve: tuple[Mapping[str, float], ...] = ()
    verified: bool | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    data: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    block_errors: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None
    pictures: Path | None = None

    @property
    def dense(self) -> bool:
        return self.cell.get("method") is None

    @property
    def restored(self) -> bool:
        return self.cell.get("restore") is not None

    @property
    def seed(self) -> int | None:
        return self.cell.get("seed")

    def sparsity(self, component: str) -> float:
        """Zeros of the prunable layers of a component that are there, as a fraction."""
        counts = self.components.get(component)
        return counts["zeros"] / counts["parameters"] if counts and counts["parameters"] else 0.0

    def asked(self, component: str) -> float:
        """The sparsity that was asked for."""
        return float((self.cell.get("sparsity") or {}).get(component, 0.0))

    @property
    def kept(self) -> int | None:
        """Parameters of the whole model that are not pruned."""
        if self.parameters is None:
            return None
        return self.parameters - sum(counts["zeros"] for counts in self.components.values())


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the runs of model folders and sweeps, in the order given; labels that several share are told apart.

    **Raises** `SparsightError`, one line, for a folder that has none.
    """
    if not folders:
        raise SparsightError("nothing to report: give folders of evaluated models, or of a sweep")
    found: list[Run] = []
    for folder in folders:
        path = Path(folder)
        if not path.is_dir():
            raise SparsightError(f"{folder}: is not a folder; give one that eval --record or sweep has written to")
        found += read_sweep(path) if (path / "sweep.json").is_file() else [read_folder(path)]
    many = {run.label for run in found if sum(other.label == run.label for other in found) > 1}
    return [_told_apart(run) if run.label in many and run.folder else run for run in found]


def _told_apart(run: Run) -> Run:
    parent = run.folder.resolve().parent.name if run.folder else ""
    return replace(run, label=f"{parent}/{run.label}") if parent else run


def read_folder(folder: str | Path, *, id: str | None = None, label: str | None = None) -> Run:
    """Read a model folder that was pruned, restored or evaluated; it may hold an evaluation and no weights."""
    path = Path(folder)
    record, evaluated = read_record(path), read_evaluation(path)
    if record is None and evaluated is None:
        if (path / "config.json").is_file():
            raise SparsightError(f"{path}: has no evaluation.json; run sparsight eval {path} --data DATA --record first")
        raise SparsightError(
            f"{path}: has neither sparsity.json nor evaluation.json nor sweep.json, so it is no run; give a folder that "
            "prune, restore, eval --record or sweep has written"
        )
    scores, answers = evaluated or ({}, ())
    try:
        held = folder_facts(path, record, scores)
        if record is not None and scores.get("weights") not in (None, held["hashes"].get("sparsity.json")):
            raise SparsightError(
                f"{path}: its evaluation is of other weights than are there now; run sparsight eval {path} --record again"
            )
        metrics, recipe = read_metrics(path), read_recipe(path)
        pruned, restored = metrics.get("prune", {}), metrics.get("restore", {})
        stages = {"prune": pruned, "restore": restored, "evaluate": scores}
        name = path.resolve().name
        return Run(
            id=id or name,
            label=label or (name if record is not None else f"{name} (dense)" if name != "dense" else name),
            cell=_cell_of(record, recipe),
            model=str((record or {}).get("base_model") or scores.get("model") or name),
            layers=layer_facts(record, pruned.get("layer_errors", {})),
            scores=tuple(scores.get("rows", ())),
            predictions=answers,
            skipped=scores.get("skipped", 0),
            seconds={stage: float(x["seconds"]) for stage, x in stages.items() if x.get("seconds") is not None},
            memory={stage: int(x["memory"]) for stage, x in stages.items() if x.get("memory")},
            curve=tuple(restored.get("curve", ())),
            recipe=recipe,
            environment=scores.get("environment", {}),
            data=str(scores.get("data", "")),
            date=str(scores.get("date", "")),
            block_errors=pruned.get("block_errors", {}),
            folder=path,
            pictures=path / PICTURES,
            **held,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise SparsightError(f"{path}: is damaged ({error}); write the folder again, or evaluate again") from error


def _cell_of(record: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """How a folder was made, as a sweep would say it, with every other setting of the recipe that may tell runs apart."""
    if record is None:
        return {"sparsity": {}, "method": None, "seed": 0}
    prune, restore = recipe.get("prune") or {}, recipe.get("restore")
    asked = {}
    for component in component_totals(record):
        rows = [entry for entry in record["layers"].values() if entry["component"] == component]
        sizes = [math.prod(entry["shape"]) for entry in rows]
        asked[component] = round(sum(e["asked"] * n for e, n in zip(rows, sizes, strict=True)) / sum(sizes), 3)
    others = {key: value for key, value in prune.items() if key not in _NOT_HOW and key not in CELL}
    pattern = prune.get("pattern") or " ".join(sorted({entry["pattern"].split()[0] for entry in record["layers"].values()}))
    return {
        **others,
        "sparsity": asked,
        "pattern": pattern,
        **{key: prune.get(key) for key in ("refine", "update", "reconstruct", "policy")},
        "method": prune.get("method") or record["method"],
        "restore": {k: v for k, v in restore.items() if k not in _NOT_HOW} if restore is not None else None,
        "seed": (restore or prune).get("seed", 0),
    }


def read_sweep(folder: str | Path) -> list[Run]:
    """Read a sweep's finished cells, the dense model first, the others as its table of results has them."""
    path = Path(folder)
    try:
        sweep = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
        if sweep["format"] != FORMAT:
            raise SparsightError(f"{path / 'sweep.json'}: format {sweep['format']} is not {FORMAT}; use what wrote it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SparsightError(f"{path / 'sweep.json'}: is damaged ({error}); run the sweep again") from error
    order = _order(path / "results.csv")
    files = sorted((path / "cells").glob("*.json"), key=lambda file: (order.get(file.stem, len(order)), _natural(file)))
    runs = [_read_cell(path, cell, sweep) for cell in files]
    if not runs:
        raise SparsightError(f"{path}: no cell of this sweep is finished; run the same sweep again to go on")
    return sorted(runs, key=lambda run: not run.dense)


def _order(results: Path) -> dict[str, int]:
    """The places of the cells in a sweep's table; empty without one."""
    if not results.is_file():
        return {}
    with results.open(newline="", encoding="utf-8", errors="replace") as file:
        return {row["id"]: place for place, row in enumerate(csv.DictReader(file)) if row.get("id")}


def _natural(path: Path) -> list[Any]:
    """So that 10 comes after 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", path.stem)]


def _read_cell(folder: Path, path: Path, sweep: Mapping[str, Any]) -> Run:
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["format"] != FORMAT:
            raise ValueError(f"format {cell['format']} is not {FORMAT}")
        answers = path.with_suffix(".jsonl")
        components = {
            name: {key: int(counts[key]) for key in ("layers", "zeros", "parameters")}
            for name, counts in cell["components"].items()
        }
        return Run(
            id=str(cell["id"]),
            label=str(cell["label"]),
            cell=dict(cell["cell"]),
            model=str(sweep.get("model", "")),
            components=components,
            layers=dict(cell["layers"]),
            parameters=cell["parameters"],
            bytes=cell["bytes"],
            packed_bytes=cell["packed_bytes"],
            scores=tuple(cell["scores"]),
            predictions=read_answers(answers) if answers.is_file() else (),
            skipped=cell.get("skipped", 0),
            seconds={stage: float(value) for stage, value in cell.get("seconds", {}).items() if value is not None},
            memory=cell.get("memory") or {},
            curve=tuple(cell.get("curve") or ()),
            verified=cell.get("verified"),
            recipe={key: value for key, value in cell["cell"].items() if value is not None},
            environment=sweep.get("environment", {}),
            data=str(sweep.get("held_out") or sweep.get("data") or ""),
            date=str(sweep.get("date", "")),
            hashes={name: str(sweep[key]) for key, name in HASHES.items() if key in sweep},
            pictures=folder / PICTURES,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise SparsightError(f"{path}: is damaged ({reason}); delete it and run the same sweep again") from error


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed only."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ in nothing but the seed, in the order of their first."""
    found: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        key, again = how(run) + _scored_on(run), 0
        if run.dense and any(other.predictions == run.predictions for other in found.get((key, 0), ())):
            continue  # the dense model of a sweep and that of a folder
        while any(run.dense or other.seed == run.seed for other in found.get((key, again), ())):
            again += 1  # the same settings and seed twice: another run, no other seed
        found.setdefault((key, again), []).append(run)
    groups = list(found.values())
    labels = apart([(_common([run.label for run in same]), same[0].cell) for same in groups])
    return [Group(label, tuple(same)) for label, same in zip(labels, groups, strict=True)]


def apart(named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Labels of cells, with what tells them apart added where several have the same; the seed does not."""
    labels = []
    for label, cell in named:
        others = [_flat(other) for same, other in named if same == label]
        mine = _flat(cell)
        differs = [key for key in mine if any(other.get(key) != mine[key] for other in others)]
        labels.append(", ".join([label, *(f"{key} {mine[key]}" for key in differs)]))
    return labels


def _flat(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's settings, those of its restoration among them."""
    nested = {k: v for k, v in cell.items() if isinstance(v, Mapping)}
    flat = {k: v for k, v in cell.items() if k not in nested and k != "seed"}
    return flat | {f"{k}.{name}": value for k, v in nested.items() for name, value in v.items()}


def _scored_on(run: Run) -> str:
    """What tells one set of held-out samples from another."""
    asked = [(row["id"], row["kind"], row["prompt"]) for row in run.predictions]
    return hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()


def how(run: Run, *without: str) -> str:
    """All that says how a run was made but its seed and what is to be left `without`, as a key."""
    told = {k: v for k, v in run.cell.items() if k not in ("seed", *without) and v not in (None, 0, False, [], "")}
    if "sparsity" in told:
        told["sparsity"] = {c: round(float(v), 4) for c, v in sorted(told["sparsity"].items()) if v}
    return json.dumps([run.model, told], sort_keys=True, default=str)


def _common(labels: Sequence[str]) -> str:
    """What the labels of several seeds have in common."""
    if len(set(labels)) == 1:
        return labels[0]
    shared = re.sub(r"[\s,;:·(\[/_-]*(seed)?[\s=:_-]*$", "", _start(labels))
    return shared or labels[0]


def _start(labels: Sequence[str]) -> str:
    """The letters that all begin with."""
    same = (letters[0] for letters in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*labels, strict=False)))
    return "".join(same)
