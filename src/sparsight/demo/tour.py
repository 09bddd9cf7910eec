"""The demo on the embedded model: evaluate, prune at 2:4, restore in two ways, verify, pack, report.

Four models are compared on held-out scenes: the dense one; the pruned one; the pruned one with a plain LoRA merged into
it, which fills the zeros again; and the pruned one restored with SparseLoRA, which keeps every zero.
"""

from __future__ import annotations

import datetime
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsight.checkpoint.folder import read_metrics, read_record
from sparsight.checkpoint.lock import locked
from sparsight.checkpoint.pack import pack_folder
from sparsight.checkpoint.verify import verify
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.errors import Interrupted, OutOfMemory, SparsightError
from sparsight.evaluation import Result, bootstrap
from sparsight.evaluation.bench import bench_folder
from sparsight.evaluation.record import environment
from sparsight.evaluation.verb import evaluate_folder
from sparsight.packing.shards import bytes_in_bfloat16
from sparsight.progress import Progress
from sparsight.pruning.verb import prune_folder
from sparsight.reporting.page import Story, write_page
from sparsight.reporting.runs import ScoredModel, read_folder
from sparsight.restoring.verb import restore_folder
from sparsight.specs import BenchSpec, EvaluateSpec, PackSpec, PruneSpec, RestoreSpec

PATTERN = "2:4"
RESTORE: dict[str, Any] = {"batch_size": 32, "lr": 3e-3, "kl": 0.1, "rank": "vision=4,connector=2,language=8"}
LABELS = {
    "dense": "dense",
    "pruned": f"pruned (Wanda, {PATTERN})",
    "lora": "plain LoRA, merged",
    "sparselora": "SparseLoRA, merged",
}
SHOWN = tuple(LABELS[name] for name in ("dense", "pruned", "sparselora"))  # in the gallery


@dataclass(frozen=True)
class Effort:
    """The number of training scenes, of test scenes and of training steps."""

    train: int = 2400
    test: int = 200
    steps: int = 200


def tour(
    out: str | Path = "demo-out",
    *,
    effort: Effort | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the demo and write models, predictions and `report.html` to `out`; the facts of the report are returned.

    **Raises** `SparsightError` for a folder that may not be replaced, `Interrupted` for Ctrl-C.
    """
    with locked(out):
        target = _fresh(Path(out), overwrite)
        try:
            return _tour(target, effort or Effort(), seed, progress)
        except (KeyboardInterrupt, Interrupted) as stop:
            raise Interrupted(f"interrupted; the demo begins again with `overwrite`, which replaces {target}") from stop
        except OutOfMemory as error:
            reason = str(error).partition(";")[0]
            raise SparsightError(f"the demo ran {reason}; close other programs, and begin again with `overwrite`") from error
        except SparsightError as error:
            error.advice = f"begin again with `overwrite`, which replaces {target}"
            raise


def _tour(target: Path, effort: Effort, seed: int, progress: Progress | None) -> dict[str, Any]:
    began = time.perf_counter()
    report = _Steps(progress)
    train = write(target / "data" / "train", "train", effort.train, seed, questions_per_scene=1)
    test = write(target / "data" / "test", "test", effort.test, seed)
    dense = MODELS["instructblip"]
    answering = EvaluateSpec(dtype="float32", max_new_tokens=40)
    results: dict[str, Result] = {}
    runs: dict[str, ScoredModel] = {}

    def score(name: str, folder: Path, seconds: dict[str, float]) -> None:
        """Evaluate one model, record the scores, and read them back."""
        report(f"evaluate {LABELS[name]}")
        home = target / name
        record = True if home == folder else home
        results[name] = evaluate_folder(folder, test, answering, record=record)
        results[name].write_predictions(target / f"predictions-{name}.jsonl")
        run = read_folder(home, label=LABELS[name])
        runs[name] = replace(run, seconds={"evaluate": run.seconds["evaluate"], **seconds})

    score("dense", dense, {})
    start = time.perf_counter()
    report("prune", 0)
    prune_folder(dense, target / "pruned", PruneSpec(pattern=PATTERN, dtype="float32", seed=seed), data=train)
    score("pruned", target / "pruned", {"prune": time.perf_counter() - start})
    for adapter in ("lora", "sparselora"):
        start = time.perf_counter()
        spec = RestoreSpec(adapter=adapter, seed=seed, steps=effort.steps, **RESTORE)
        progress_of = report.part(f"restore with {LABELS[adapter].split(',')[0]}")
        restore_folder(target / "pruned", target / adapter, spec, data=train, teacher=dense, progress=progress_of)
        score(adapter, target / adapter, {"restore": time.perf_counter() - start})
    report("pack and time", 0)
    packed = pack_folder(target / "sparselora", target / "packed", PackSpec())
    speed = bench_folder(target / "packed", BenchSpec(repeats=10, new_tokens=8))
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "seed": seed,
        "pattern": PATTERN,
        "restore": {"steps": effort.steps, **RESTORE},
        "scenes": {"train": effort.train, "test": effort.test},
        "runs": {name: _facts(run, results[name]) for name, run in runs.items()},
        "layers": _layers(target),
        "teacher": {k: v for k, v in read_metrics(target / "sparselora")["restore"].items() if k != "curve"},
        "verify": verify(target / "sparselora", against=target / "pruned"),
        "packed": {**packed["bytes"], "verified": not verify(target / "packed")["differences"]},
        "bfloat16": bytes_in_bfloat16(target / "packed"),
        "bench": speed,
        "seconds": time.perf_counter() - began,
        "out": str(target),
    }
    verified = not facts["verify"]["differences"]
    models = [replace(run, verified=verified, bench=speed) if name == "sparselora" else run for name, run in runs.items()]
    facts["report"] = str(write_page(models, target / "report.html", story=_story(facts, test)))
    return facts


class _Steps:
    """Progress over all steps, in shares of their usual time."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.done, self.all = progress, 0, 5

    def __call__(self, note: str, advance: int = 1) -> None:
        self.done += advance
        if self.progress:
            self.progress(note, self.done * 100, self.all * 100)

    def part(self, note: str) -> Progress:
        def inner(_: str, step: int, steps: int) -> None:
            if self.progress:
                self.progress(note, self.done * 100 + 100 * step // steps, self.all * 100)

        return inner


def _fresh(out: Path, overwrite: bool) -> Path:
    """Make an empty folder; only an earlier demo's is ever replaced."""
    if out.is_file():
        raise SparsightError(f"{out}: is a file; give a folder to write to")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise SparsightError(f"{out}: exists and is not empty; choose another folder, or add `overwrite`")
        if not (out / "data" / "test" / "metadata.jsonl").is_file():
            raise SparsightError(f"{out}: is not the folder of an earlier demo, so it is not replaced; choose another")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparsightError(f"{out}: could not be made ({error.strerror}); choose another folder") from error
    return out


def _facts(run: ScoredModel, result: Result) -> dict[str, Any]:
    """One model: questions, captions, zeros, bytes."""
    return {
        "label": run.label,
        **captions_and_questions(result),
        "rows": list(result.rows),
        "sparsity": {component: run.sparsity(component) for component in ("vision", "language")},
        "bytes": run.bytes,
        "packed_bytes": run.packed_bytes,
        "parameters": run.parameters,
        "seconds": sum(seconds for stage, seconds in run.seconds.items() if stage != "evaluate"),
    }


def captions_and_questions(result: Result) -> dict[str, dict[str, float]]:
    """Exact match over all questions and over all captions, and the captions' CIDEr-D, with 95 % intervals."""
    return {
        "questions": _mean(result, lambda row: row["kind"] != "caption", "exact_match"),
        "captions": _mean(result, lambda row: row["kind"] == "caption", "exact_match"),
        "cider": _mean(result, lambda row: row["kind"] == "caption", "cider_d"),
    }


def _mean(result: Result, select: Callable[[Mapping[str, Any]], bool], metric: str) -> dict[str, float]:
    values = [row["scores"][metric] for row in result.predictions if select(row)]
    low, high = bootstrap(values)
    return {"value": sum(values) / len(values), "low": low, "high": high, "n": len(values)}


def _layers(out: Path) -> list[dict[str, Any]]:
    """Per pruned layer: the planned sparsity, and that of each model."""
    records = {name: (read_record(out / name) or {})["layers"] for name in ("pruned", "lora", "sparselora")}
    return [
        {"name": layer, "component": entry["component"], "block": entry["block"], "asked": entry["asked"]}
        | {name: record[layer]["got"] for name, record in records.items()}
        for layer, entry in records["pruned"].items()
    ]


def _story(facts: Mapping[str, Any], test: Path) -> Story:
    """The demo's own text and numbers, beside the tables and figures of every page."""
    runs, proof, restore, out = facts["runs"], facts["verify"], facts["restore"], facts["out"]
    lines = [json.loads(line) for line in (test / "metadata.jsonl").read_text().splitlines()]
    dense, pruned, restored = (runs[name] for name in ("dense", "pruned", "sparselora"))
    numbers = [
        (
            f"{_percent(pruned[key])} → {_percent(restored[key])} %",
            f"{what}, pruned → restored (dense {_percent(dense[key])} %)",
        )
        for key, what in (("captions", "captions exactly right"), ("questions", "questions right"))
    ]
    if (share := regained(runs)["captions"]) is not None:
        numbers.append((f"{100 * share:.0f} %", "of the caption points that pruning cost are back"))
    counted = f"zeros in the {proof['layers']} pruned layers after restoring, recounted from the saved files"
    numbers.append((f"{100 * proof['sparsity']:.2f} %", counted))
    teacher = facts["teacher"]
    shared = ""
    if teacher["teacher"] == "shared":
        ratio = teacher["weight_bytes"] / teacher["dense_bytes"]
        shared = f"; with SparseLoRA it shares the student's weights ({ratio:.2f}× one dense copy)"
    settings = ", ".join(f"{name} {value}" for name, value in restore.items())
    return Story(
        eyebrow="Sparsight · digit scenes",
        title=f"Half the weights of {proof['layers']} layers gone at {facts['pattern']}, and the model still reads",
        lead=f"An InstructBLIP of {dense['parameters']:,} parameters that reads real handwritten digits, pruned with Wanda "
        "in vision and language, then restored on "
        f"{restore['steps']} steps of {restore['batch_size']} samples. Every score is on {facts['scenes']['test']} held-out "
        f"scenes whose digits were never trained on: {dense['questions']['n']} questions, {dense['captions']['n']} "
        "captions. The score is exact match, the mean of questions and captions.",
        numbers=numbers,
        table_note="A plain LoRA recovers too, but merging it fills the zeros again. SparseLoRA is merged and keeps them.",
        gallery_note="Held-out scenes of every kind of question, those that pruning hurt first. "
        "✓ is an exact match, ✗ is none.",
        proof={"broken": bool(proof["differences"]), "command": f"sparsight verify {out}/sparselora --against {out}/pruned"}
        | _proof(proof),
        command=f"sparsight demo {out} --seed {facts['seed']}\nsparsight report {out}/dense {out}/pruned {out}/sparselora",
        notes=[f"{facts['date']} · {facts['seconds']:.0f} s in all · restore: {settings}"],
        picture=lambda i: (test / lines[i]["image"]).read_bytes(),
        captions={
            "layers": "Zeros in every pruned layer. SparseLoRA lies on the pruned model; plain LoRA is at the bottom.",
            "losses": f"Restoration on answer tokens. The dense model is the teacher{shared}.",
        },
        gallery_labels=SHOWN,
        best=LABELS["sparselora"],
        sparse_labels=(LABELS["lora"],),
    )


def _proof(proof: Mapping[str, Any]) -> dict[str, str]:
    if proof["differences"]:
        title = f"{len(proof['differences'])} layers differ from their record:"
        return {"title": title, "text": ", ".join(proof["differences"])}
    return {
        "title": f"{proof['layers']} layers, {proof['zeros']:,} zeros, {100 * proof['sparsity']:.2f} %.",
        "text": "Recounted from the saved files: pattern, count, dtype and hashes agree, and no zero of the pruned model "
        "was lost.",
    }


def _percent(score: Mapping[str, float]) -> str:
    return f"{100 * score['value']:.1f}"


def regained(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The fraction of the points lost by pruning that SparseLoRA regained; None where none were lost."""
    shares = {}
    for key in ("questions", "captions"):
        dense, pruned, restored = (runs[name][key]["value"] for name in ("dense", "pruned", "sparselora"))
        shares[key] = (restored - pruned) / (dense - pruned) if dense > pruned else None
    return shares
