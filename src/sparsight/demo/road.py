"""The whole road on the embedded model: measure, prune at 2:4, restore in two ways, prove, report.

Four models are compared on held-out scenes: the dense one; the pruned one; the pruned one with a plain LoRA merged into
it, which fills the zeros again; and the pruned one restored with SparseLoRA, which keeps every zero.
"""

from __future__ import annotations

import base64
import datetime
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sparsight
from sparsight import verbs
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.errors import SparsightError
from sparsight.evaluate import Result, bootstrap
from sparsight.model.anatomy import Layer
from sparsight.model.checkpoint import read_metrics, read_record
from sparsight.report.page import write_page

PATTERN = "2:4"
RESTORE: dict[str, Any] = {"batch_size": 32, "lr": 3e-3, "kl": 0.1, "rank": "vision=4,connector=2,language=8"}
LABELS = {
    "dense": "dense",
    "pruned": f"pruned (Wanda, {PATTERN})",
    "lora": "plain LoRA, merged",
    "sparselora": "SparseLoRA, merged",
}
SHOWN = ("dense", "pruned", "sparselora")  # in the gallery
GALLERY = 12

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Effort:
    """How many scenes the demo restores on and is tested on, and for how many steps."""

    train: int = 2400
    test: int = 200
    steps: int = 200


def road(
    out: str | Path = "demo-out",
    *,
    effort: Effort | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the demo and write models, predictions and `report.html` to `out`; the facts of the report are returned."""
    effort = effort or Effort()
    target = _fresh(Path(out), overwrite)
    began = time.perf_counter()
    said = _Steps(progress)
    train = write(target / "data" / "train", "train", effort.train, seed, questions_per_scene=1)
    test = write(target / "data" / "test", "test", effort.test, seed)
    dense = MODELS["instructblip"]
    runs = {"dense": _run("dense", dense, test, target, 0.0, said)}
    start = time.perf_counter()
    said("prune", 0)
    verbs.prune(dense, target / "pruned", data=train, pattern=PATTERN, dtype="float32", seed=seed)
    runs["pruned"] = _run("pruned", target / "pruned", test, target, time.perf_counter() - start, said)
    for adapter in ("lora", "sparselora"):
        start = time.perf_counter()
        verbs.restore(
            target / "pruned", target / adapter, data=train, teacher=dense, adapter=adapter, seed=seed,
            progress=said.part(f"restore with {LABELS[adapter].split(',')[0]}"), steps=effort.steps, **RESTORE,
        )  # fmt: skip
        runs[adapter] = _run(adapter, target / adapter, test, target, time.perf_counter() - start, said)
    facts = {
        "date": datetime.date.today().isoformat(),
        "environment": _environment(),
        "seed": seed,
        "pattern": PATTERN,
        "restore": {"steps": effort.steps, **RESTORE},
        "scenes": {"train": effort.train, "test": effort.test},
        "runs": {name: facts for name, (facts, _) in runs.items()},
        "layers": _layers(target),
        "errors": read_metrics(target / "pruned")["prune"],
        "curves": {name: read_metrics(target / name)["restore"]["curve"] for name in ("lora", "sparselora")},
        "teacher": {k: v for k, v in read_metrics(target / "sparselora")["restore"].items() if k != "curve"},
        "verify": verbs.verify(target / "sparselora", against=target / "pruned"),
        "gallery": _gallery({name: result for name, (_, result) in runs.items()}, test),
        "seconds": time.perf_counter() - began,
        "out": str(target),
    }
    facts["report"] = str(write_page(facts, target / "report.html"))
    return facts


class _Steps:
    """Progress over the whole road, in shares of its usual time."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.done, self.all = progress, 0, 6

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
            raise SparsightError(f"{out}: exists and is not empty; choose another folder, or add --overwrite")
        if not (out / "data" / "test" / "metadata.jsonl").is_file():
            raise SparsightError(f"{out}: is not the folder of an earlier demo, so it is not replaced; choose another")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparsightError(f"{out}: could not be made ({error.strerror}); choose another folder") from error
    return out


def _run(name: str, folder: Path, test: Path, out: Path, seconds: float, said: _Steps) -> tuple[dict[str, Any], Result]:
    """Score one model: questions, captions, zeros, bytes."""
    said(f"evaluate {LABELS[name]}")
    result = verbs.evaluate(folder, data=test, dtype="float32", max_new_tokens=40)
    result.write_predictions(out / f"predictions-{name}.jsonl")
    body, model = verbs.inspect(folder)
    size = sum(p.numel() for p in model.parameters())
    counts = {c: _zeros(body.component(c)) for c in ("vision", "language")}
    mask = sum(n for z, n in counts.values() if z) // 8  # one bit per weight of what is pruned
    facts = {
        "label": LABELS[name],
        **captions_and_questions(result),
        "rows": list(result.rows),
        "sparsity": {c: z / n for c, (z, n) in counts.items()},
        "bytes": 4 * size,
        "packed_bytes": 4 * (size - sum(z for z, _ in counts.values())) + mask,
        "parameters": size,
        "seconds": seconds,
    }
    return facts, result


def captions_and_questions(result: Result) -> dict[str, dict[str, float]]:
    """Exact match over all questions and over all captions, and the captions' CIDEr-D, with 95 % intervals."""
    return {
        "questions": _mean(result, lambda row: row["kind"] != "caption", "exact_match"),
        "captions": _mean(result, lambda row: row["kind"] == "caption", "exact_match"),
        "cider": _mean(result, lambda row: row["kind"] == "caption", "cider_d"),
    }


def _zeros(layers: Sequence[Layer]) -> tuple[int, int]:
    return sum(int((x.weight == 0).sum()) for x in layers), sum(x.weight.numel() for x in layers)


def _mean(result: Result, chosen: Callable[[Mapping[str, Any]], bool], metric: str) -> dict[str, float]:
    values = [row["scores"][metric] for row in result.predictions if chosen(row)]
    low, high = bootstrap(values)
    return {"value": sum(values) / len(values), "low": low, "high": high, "n": len(values)}


def _layers(out: Path) -> list[dict[str, Any]]:
    """Per pruned layer: what was asked and what each model holds."""
    records = {name: (read_record(out / name) or {})["layers"] for name in ("pruned", "lora", "sparselora")}
    return [
        {"name": layer, "component": entry["component"], "block": entry["block"], "asked": entry["asked"]}
        | {name: record[layer]["got"] for name, record in records.items()}
        for layer, entry in records["pruned"].items()
    ]


def _gallery(results: Mapping[str, Result], test: Path) -> list[dict[str, Any]]:
    """Held-out scenes with the answers side by side: of every kind in turn, those where pruning did harm first."""
    lines = [json.loads(line) for line in (test / "metadata.jsonl").read_text().splitlines()]
    answered = [results[name].predictions for name in SHOWN]
    by_kind: dict[str, list[int]] = {}
    for i, line in enumerate(lines):
        by_kind.setdefault(line["kind"], []).append(i)
    for members in by_kind.values():
        members.sort(key=lambda i: (answered[1][i]["correct"], i))
    chosen: list[int] = []
    while len(chosen) < min(GALLERY, len(lines)):
        for members in by_kind.values():
            if members and len(chosen) < GALLERY:
                chosen.append(members.pop(0))
    return [
        {
            "image": "data:image/png;base64," + base64.b64encode((test / lines[i]["image"]).read_bytes()).decode(),
            "kind": lines[i]["kind"],
            "prompt": lines[i]["prompt"],
            "answer": lines[i]["answer"],
            "answers": {
                name: {"text": rows[i]["prediction"], "right": rows[i]["correct"]}
                for name, rows in zip(SHOWN, answered, strict=True)
            },
        }
        for i in chosen
    ]


def _environment() -> dict[str, str]:
    import peft
    import torch
    import transformers

    return {
        "sparsight": sparsight.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
