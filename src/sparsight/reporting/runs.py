"""Runs: one model each, with its settings, sizes and scores, read from the folder of a model or of a sweep, or from a sample
log of lmms-eval."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sparsight.checkpoint.card import component_totals
from sparsight.checkpoint.folder import identity, read_metrics, read_recipe, read_record
from sparsight.checkpoint.stages import stages_of
from sparsight.errors import SparsightError
from sparsight.evaluation.bench import read_bench
from sparsight.evaluation.record import PICTURES, read_answers, read_evaluation, saved_bytes
from sparsight.files import read_json
from sparsight.packing.headers import read_header
from sparsight.reporting.lmms_logs import read_log

FORMAT = 1
HASHES = {"model_hash": "dense model", "held_out_fingerprint": "fingerprint", "data_fingerprint": "training samples"}
CELL = ("sparsity", "pattern", "method", "refine", "update", "reconstruct", "policy", "restore", "seed")
# settings of a recipe that do not change what the model is
NOT_IN_CELL = {
    "model", "data", "sparse", "teacher", "teacher_mode", "fingerprint", "seed", "batch_size", "dtype", "save_every",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ScoredModel:
    """A run: one model with its settings, sizes and scores.

    `cell` has the settings: "sparsity" (the target per component), "pattern", "method" (None for the dense model), "refine",
    "update", "reconstruct", "policy", "restore" (None or settings), "seed", and all else that tells one run from another.
    `components` has {"layers", "zeros", "parameters"} of the prunable layers. `layers` has {"component", "block", "got",
    "error"} by name; "got" is a fraction, the error is relative or None. `scores` and `predictions` are those of
    `evaluation.Result`. `seconds` and `memory` (the peak of the process, in bytes) are per stage. `bench` is
    what `bench` recorded. `pictures` is the folder
    with N.png for the first samples.
    """

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
    bench: Mapping[str, Any] | None = None
    folder: Path | None = None
    pictures: Path | None = None

    @property
    def is_dense(self) -> bool:
        """Whether the model was not pruned."""
        return self.cell.get("method") is None

    @property
    def is_restored(self) -> bool:
        """Whether the model was restored after pruning."""
        return self.cell.get("restore") is not None

    @property
    def seed(self) -> int | None:
        """The seed of the restoration, or of the pruning where there was none."""
        return self.cell.get("seed")

    def sparsity(self, component: str) -> float:
        """The fraction of zeros in the prunable layers of a component; 0 without such layers."""
        counts = self.components.get(component)
        return counts["zeros"] / counts["parameters"] if counts and counts["parameters"] else 0.0

    def target_sparsity(self, component: str) -> float:
        """The fraction of zeros that the settings ask for; 0 for a component that is not pruned."""
        return float((self.cell.get("sparsity") or {}).get(component, 0.0))

    @property
    def nonzero_parameters(self) -> int | None:
        """Parameters of the whole model without the zeros of its prunable layers; None if they were not counted."""
        if self.parameters is None:
            return None
        return self.parameters - sum(counts["zeros"] for counts in self.components.values())

    @cached_property
    def samples_key(self) -> int:
        """A hash of the held-out samples: the same for runs that were scored on the same questions and answers."""
        return hash(tuple((row["id"], row["kind"], row["prompt"], tuple(row["answers"])) for row in self.predictions))


def read_runs(folders: Sequence[str | Path]) -> list[ScoredModel]:
    """Read the runs of model folders, sweeps and sample logs of lmms-eval, in their order; equal labels get the name of the
    parent folder.

    **Raises** `SparsightError`, one line, for a folder without a run and a file that is no log.
    """
    if not folders:
        raise SparsightError("nothing to report: give folders of evaluated models, or of a sweep")
    runs: list[ScoredModel] = []
    for folder in folders:
        path = Path(folder)
        if path.is_file() and path.suffix == ".jsonl":
            runs.append(read_answered(path))
            continue
        if not path.is_dir():
            raise SparsightError(
                f"{folder}: is not a folder; give one that eval --record or sweep has written to, or a *_samples_*.jsonl of "
                "lmms-eval"
            )
        runs += read_sweep(path) if (path / "sweep.json").is_file() else [read_folder(path)]
    labels = Counter(run.label for run in runs)
    return [
        replace(run, label=f"{run.folder.resolve().parent.name}/{run.label}")
        if run.folder and labels[run.label] > 1
        else run
        for run in runs
    ]


def read_folder(folder: str | Path, *, label: str | None = None) -> ScoredModel:
    """Read a model folder that was pruned, restored or evaluated; it may hold an evaluation and no weights.

    **Raises** `SparsightError` for a folder without a run, a damaged file, and an evaluation of other weights.
    """
    path = Path(folder)
    record, evaluation = read_record(path), read_evaluation(path)
    if record is None and evaluation is None:
        if (path / "config.json").is_file():
            raise SparsightError(f"{path}: has no evaluation.json; run sparsight eval {path} --data DATA --record first")
        raise SparsightError(
            f"{path}: has neither sparsity.json nor evaluation.json nor sweep.json, so it is no run; give a folder that "
            "prune, restore, eval --record or sweep has written"
        )
    scores, answers = evaluation or ({}, ())
    hashes = {"fingerprint": str(scores["fingerprint"])} if scores.get("fingerprint") else {}
    if record is not None:
        hashes["sparsity.json"] = str(identity(path))
        if scores.get("weights") not in (None, hashes["sparsity.json"]):
            raise SparsightError(
                f"{path}: its evaluation is of other weights than are there now; run sparsight eval {path} --record again"
            )
    try:
        metrics, recipe = read_metrics(path), read_recipe(path)
        pruning, restoration = metrics.get("prune", {}), metrics.get("restore", {})
        stages = {"prune": pruning, "restore": restoration, "evaluate": scores}
        layers, errors = (record or {}).get("layers", {}), pruning.get("layer_errors", {})
        name = path.resolve().name
        return ScoredModel(
            label=label or (f"{name} (dense)" if record is None and name != "dense" else name),
            cell=_cell(record, recipe),
            model=str((record or {}).get("base_model") or scores.get("model") or name),
            layers={
                layer: {**{key: entry[key] for key in ("component", "block", "got")}, "error": errors.get(layer)}
                for layer, entry in layers.items()
            },
            scores=tuple(scores.get("rows", ())),
            predictions=answers,
            skipped=scores.get("skipped", 0),
            seconds={stage: float(x["seconds"]) for stage, x in stages.items() if x.get("seconds") is not None},
            memory={stage: int(x["memory"]) for stage, x in stages.items() if x.get("memory")},
            curve=tuple(restoration.get("curve", ())),
            recipe=recipe,
            environment=scores.get("environment", {}),
            data=str(scores.get("data", "")),
            date=str(scores.get("date", "")),
            block_errors=pruning.get("block_errors", {}),
            bench=read_bench(path),
            hashes=hashes,
            folder=path,
            pictures=path / PICTURES,
            **_sizes(path, record, scores),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise SparsightError(f"{path}: is damaged ({error}); write the folder again, or evaluate again") from error


def read_answered(path: str | Path) -> ScoredModel:
    """Read a sample log of lmms-eval; settings and sizes are those of the model's folder where it is on this machine.

    **Raises** `SparsightError` for a file that is no such log.
    """
    log = read_log(path)
    folder = Path(log.model)
    record = read_record(folder)
    local = record is not None or (folder / "config.json").is_file()
    cell = _cell(record, read_recipe(folder)) if local else {"method": "unknown", "seed": 0}
    name = folder.name or log.model
    return ScoredModel(
        label=f"{name}, lmms-eval",
        cell={**cell, "answered_by": f"lmms-eval {log.source}".strip()},
        model=str((record or {}).get("base_model") or log.model),
        scores=log.result.rows,
        predictions=log.result.predictions,
        data=log.task,
        date=log.date,
        **(_sizes(folder, record, {}) if local else {}),
    )


def _sizes(folder: Path, record: Mapping[str, Any] | None, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Components, parameters and bytes of a model folder, as `ScoredModel` has them, without loading the model.

    Bytes come from the headers of the weights' files; without such files, from the evaluation.
    """
    stored = sum(_tensor_bytes(file) for file in folder.glob("*.safetensors"))
    sizes = {"components": scores.get("components", {}), "parameters": scores.get("parameters")}
    sizes |= {key: stored or scores.get(key) for key in ("bytes", "packed_bytes")}
    if record is not None:
        sizes["components"] = {
            component: {"layers": layers, "zeros": zeros, "parameters": parameters}
            for component, (layers, zeros, parameters) in component_totals(record).items()
        }
        entries = record["layers"].values()
        saved = sum(saved_bytes(e["zeros"], math.prod(e["shape"]), getattr(torch, e["dtype"]).itemsize) for e in entries)
        sizes["parameters"] = record.get("parameters") or sizes["parameters"]
        sizes["packed_bytes"] = None if sizes["bytes"] is None else sizes["bytes"] - saved
    return sizes


def _tensor_bytes(path: Path) -> int:
    """Bytes of the tensors of a safetensors file, from its header."""
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in read_header(path).entries.values())


def _cell(record: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a folder, in the form of a sweep's cell, with every other setting that tells runs apart."""
    if record is None:
        return {"sparsity": {}, "method": None, "seed": 0}
    prunings, restorations = stages_of(recipe, "prune") or stages_of(recipe, "search"), stages_of(recipe, "restore")
    prune, restore = prunings[-1] if prunings else {}, restorations[-1] if restorations else None
    counts = {"prunings": len(prunings), "restorations": len(restorations)}
    sparsity = {}
    for component, (_, _, parameters) in component_totals(record).items():
        entries = [entry for entry in record["layers"].values() if entry["component"] == component]
        sparsity[component] = round(sum(entry["asked"] * math.prod(entry["shape"]) for entry in entries) / parameters, 3)
    kinds = {entry["pattern"].split()[0] for entry in record["layers"].values()}
    return {
        **{key: value for key, value in prune.items() if key not in NOT_IN_CELL and key not in CELL},
        **{name: count for name, count in counts.items() if count > 1},
        "sparsity": sparsity,
        "pattern": prune.get("pattern") or " ".join(sorted(kinds)),
        **{key: prune.get(key) for key in ("refine", "update", "reconstruct")},
        "policy": "search" if "search" in recipe and "prune" not in recipe else prune.get("policy"),
        "method": prune.get("method") or record["method"],
        "restore": None if restore is None else {k: v for k, v in restore.items() if k not in NOT_IN_CELL},
        "seed": (restore or prune).get("seed", 0),
    }


def read_sweep(folder: str | Path) -> list[ScoredModel]:
    """Read a sweep's finished cells: the dense model first, the others in the order of its table of results.

    **Raises** `SparsightError` for a damaged file and for a sweep without a finished cell.
    """
    path = Path(folder)
    sweep = read_json(path / "sweep.json", "run the sweep again")
    if sweep.get("format") != FORMAT:
        raise SparsightError(f"{path / 'sweep.json'}: format {sweep.get('format')} is not {FORMAT}; use what wrote it")
    ranks = _ranks(path / "results.csv")

    def rank(file: Path) -> tuple[int, list[int | str]]:  # 10 comes after 9
        parts = re.split(r"(\d+)", file.stem)
        return ranks.get(file.stem, len(ranks)), [int(part) if part.isdigit() else part for part in parts]

    files = sorted((path / "cells").glob("*.json"), key=rank)
    runs = [_read_cell(path, file, sweep) for file in files]
    if not runs:
        raise SparsightError(f"{path}: no cell of this sweep is finished; run the same sweep again to go on")
    return sorted(runs, key=lambda run: not run.is_dense)


def _ranks(results: Path) -> dict[str, int]:
    """The row of every cell in a sweep's table; empty without a table."""
    if not results.is_file():
        return {}
    with results.open(newline="", encoding="utf-8", errors="replace") as file:
        return {row["id"]: rank for rank, row in enumerate(csv.DictReader(file)) if row.get("id")}


def _read_cell(folder: Path, path: Path, sweep: Mapping[str, Any]) -> ScoredModel:
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["format"] != FORMAT:
            raise ValueError(f"format {cell['format']} is not {FORMAT}")
        answers = path.with_suffix(".jsonl")
        counts = ("layers", "zeros", "parameters")
        return ScoredModel(
            label=str(cell["label"]),
            cell=dict(cell["cell"]),
            model=str(sweep.get("model", "")),
            components={name: {key: int(x[key]) for key in counts} for name, x in cell["components"].items()},
            layers=dict(cell["layers"]),
            **{key: cell[key] for key in ("parameters", "bytes", "packed_bytes")},
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
