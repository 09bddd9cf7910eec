"""What pruning costs on a demo model, and how much SparseLoRA brings back: 2:4 and 70 % unstructured.

Wanda on both components, then restoration on training scenes; exact match on scenes whose digits were never trained on,
with 95 % intervals. The gains at 70 % and at 2:4 stand beside the paper's +47.6 % and +11.3 % (which model and metric,
its abstract does not say).

    python benchmarks/restoration.py [--model instructblip] [--steps 600] [--scenes 500]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sparsight import verbs
from sparsight.demo import MODELS
from sparsight.demo.road import RESTORE, captions_and_questions
from sparsight.demo.scenes import write

SETTINGS: dict[str, dict[str, Any]] = {"2:4": {"pattern": "2:4"}, "70 %": {"pattern": "row", "sparsity": 0.7}}
COLUMNS = (
    "date",
    "torch",
    "model",
    "setting",
    "result",
    "steps",
    "questions",
    "low",
    "high",
    "captions",
    "low",
    "high",
    "s",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="instructblip")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    asked = parser.parse_args()
    dense, rows = MODELS[asked.model], []

    def measure(setting: str, result: str, folder: Path, steps: int, seconds: float) -> dict[str, float]:
        scored = verbs.evaluate(folder, data=test, dtype="float32", max_new_tokens=40)
        found = captions_and_questions(scored)
        cells = [100 * found[key][part] for key in ("questions", "captions") for part in ("value", "low", "high")]
        today = datetime.date.today()
        rows.append(
            (today, torch.__version__, asked.model, setting, result, steps, *(f"{c:.1f}" for c in cells), round(seconds))
        )
        print("  ".join(f"{cell!s:>9}" for cell in rows[-1][3:]), flush=True)
        return {"questions": cells[0], "captions": cells[3]}

    with tempfile.TemporaryDirectory() as scratch:
        train = write(Path(scratch, "train"), "train", 8 * asked.steps, seed=0)
        test = write(Path(scratch, "test"), "test", asked.scenes, seed=0)
        print("  ".join(f"{name:>9}" for name in COLUMNS[3:]))
        best = measure("-", "dense", dense, 0, 0)
        for setting in asked.settings:
            sparse, restored = Path(scratch, f"sparse {setting}"), Path(scratch, f"restored {setting}")
            start = time.perf_counter()
            verbs.prune(dense, sparse, data=train, dtype="float32", **SETTINGS[setting])
            before = measure(setting, "pruned", sparse, 0, time.perf_counter() - start)
            start = time.perf_counter()
            verbs.restore(sparse, restored, data=train, teacher=dense, steps=asked.steps, **RESTORE)
            after = measure(setting, "restored", restored, asked.steps, time.perf_counter() - start)
            assert not verbs.verify(restored, against=sparse)["differences"]
            for key in ("questions", "captions"):
                gain, lost = after[key] - before[key], best[key] - before[key]
                print(f"{setting}: {key} gain {gain:.1f} points, {gain / lost:.0%} of the {lost:.1f} lost; every zero kept")
    path = Path(__file__).parent / f"restoration-{asked.model}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
