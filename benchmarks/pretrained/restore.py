"""What `sparsight restore` gives back to the model that `build.py` made: its defaults, and a small grid around them.

Wanda prunes vision and language at 2:4 and at 70 % as in `oneshot.py`; SparseLoRA is then trained on `restore.jsonl`
(questions, captions and passages of text) with the dense model as teacher. A row is measured as in `oneshot.py`. `regained`
is the share of the exact match that pruning lost, `text_regained` that of the log of the perplexity.

    python benchmarks/pretrained/restore.py MODEL [--settings 2:4 "70 %"] [--rows "kl 0.5" "defaults"] [--work FOLDER]

Results: restore.csv beside this file. A row that is there already is not measured again; remove it to measure it again.
"""

from __future__ import annotations

import argparse
import datetime
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import CPU, Measure, keep, stored
from oneshot import SETTINGS

import sparsight

STEPS, SIZE = 40, 8
GRID: dict[str, dict[str, Any]] = {  # beside `steps` and `batch_size`, what is not named is the default of `restore`
    "defaults": {},
    "preset paper": {"preset": "paper"},
    "lr 5e-4": {"lr": 5e-4},
    "lr 2e-3": {"lr": 2e-3},
    "kl 0": {"kl": 0.0},
    "kl 0.5": {"kl": 0.5},
    "kl 0.9": {"kl": 0.9},
    "root": {"reduction": "root"},
    "answer": {"reduction": "answer"},
    "root, 120 steps": {"reduction": "root", "steps": 120},
    "120 steps": {"steps": 120},
    # what `restore` does with no option, from weights in bfloat16: a pass over the data in steps of 32
    "one epoch": {"steps": None, "batch_size": 8, "accumulate": 4, "dtype": "bfloat16"},
}
COLUMNS = (
    *("date", "torch", "cpu", "setting", "row", "steps", "batch_size", "lr", "kl", "reduction"),
    *("samples", "questions", "passages"),
    *("exact", "low", "high", "perplexity", "regained", "text_regained", "restore_s"),
)
FILE = Path(__file__).with_name("restore.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=["2:4", "70 %"])
    parser.add_argument("--rows", nargs="+", choices=tuple(GRID), default=list(GRID))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--work", type=Path, help="folder for the sparse models and the teacher's outputs")
    given = parser.parse_args()
    fixed = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "cpu": CPU,
        "samples": given.samples,
        "questions": given.questions,
        "passages": given.passages,
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        base(given.model, "-", "dense", None, fixed)
        for setting in given.settings:
            sparse = work / f"wanda-{setting.replace(' %', '').replace(':', '-')}"
            if not sparse.is_dir():
                sparsight.prune(
                    given.model,
                    sparse,
                    data=given.model / "data" / "calibration.jsonl",
                    dtype="float32",
                    samples=given.samples,
                    **SETTINGS[setting],
                )
            base(given.model, setting, "wanda", sparse, fixed)
            for row in given.rows:
                if not find(setting, row, given.questions):
                    restore(given.model, sparse, setting, row, work, fixed)


def find(setting: str, row: str, questions: int) -> dict[str, str] | None:
    """The stored row, if there is one of this kind of CPU."""
    key = (CPU, setting, row, str(questions))
    return next((r for r in stored(FILE) if (r["cpu"], r["setting"], r["row"], r["questions"]) == key), None)


def base(folder: Path, setting: str, row: str, sparse: Path | None, fixed: dict[str, Any]) -> None:
    """Measure a model that is not restored, unless it is stored."""
    if not find(setting, row, fixed["questions"]):
        keep({**fixed, "setting": setting, "row": row, **score(folder, sparse or folder, fixed)}, FILE, COLUMNS)


def score(folder: Path, measured: Path, fixed: dict[str, Any]) -> dict[str, str]:
    """Measure the model of a folder in float32, on the data of the dense one."""
    model, processor = sparsight.load(measured, dtype="float32")
    return Measure(folder, processor, fixed["questions"], fixed["passages"])(model)


def restore(folder: Path, sparse: Path, setting: str, row: str, work: Path, fixed: dict[str, Any]) -> None:
    """Restore a sparse folder by one row of the grid, and keep what it scores."""
    how = {"steps": STEPS, "batch_size": SIZE, "dtype": "float32", **GRID[row]}
    began = time.perf_counter()
    done = sparsight.restore(
        sparse, work / "restored", data=folder / "data" / "restore.jsonl", teacher=folder, overwrite=True,
        **how,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    scores = score(folder, work / "restored", fixed)
    dense, pruned = find("-", "dense", fixed["questions"]), find(setting, "wanda", fixed["questions"])
    assert dense is not None
    assert pruned is not None
    spec, lr = sparsight.RestoreSpec(**how), done.metrics["restore"]["lr"]
    curve = done.metrics["restore"]["curve"]
    cells = {"steps": spec.steps or curve[-1]["step"], "batch_size": spec.rows * spec.accumulate, "lr": lr, "kl": spec.kl}
    cells |= {"reduction": spec.reduction, "restore_s": f"{seconds:.0f}"}
    shares = {
        "regained": share(float(dense["exact"]), float(pruned["exact"]), float(scores["exact"])),
        "text_regained": share(*(math.log(float(r["perplexity"])) for r in (dense, pruned, scores))),
    }
    keep({**fixed, "setting": setting, "row": row, **cells, **scores, **shares}, FILE, COLUMNS)


def share(dense: float, pruned: float, restored: float) -> str:
    """The share of what pruning lost that restoration regained, in percent."""
    return f"{100 * (restored - pruned) / (dense - pruned):.0f}" if abs(dense - pruned) > 1e-9 else ""


if __name__ == "__main__":
    main()
