"""How much of the loss of pruning is restored: SparseLoRA and other adapters on the demo models, three seeds.

Vision and language are pruned by Wanda (128 calibration samples) or by the method of a recipe; then every adapter gets the
same training scenes, the same steps and the same teacher, and answers held-out scenes whose digits were never trained on:
exact match over questions and captions, and the perplexity of the right answers. A seed draws the calibration samples, the
training samples, their order and the first values of the adapters. 100 steps of 16; learning rates were chosen on samples
held out from training.

    python benchmarks/recovery.py [--model instructblip llava] [--settings "2:4" "70 %"] [--recipes ...] [--seeds 0 1 2]

Results: recovery-MODEL.csv beside this file, a row per setting, recipe and seed; `right` holds which answers were right, in
hexadecimal. What is there already is not measured again unless with `--again`. `--table` prints the files as Markdown, and
the paired differences between recipes, and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rows
import torch

from sparsight import api, load
from sparsight.data import Encoder, read
from sparsight.demo import MODELS
from sparsight.demo.scenes import write

SETTINGS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "70 %": {"sparsity": 0.7},
    "80 %": {"sparsity": 0.8},
    "90 %": {"sparsity": 0.9},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
TRAIN: dict[str, Any] = {"steps": 100, "batch_size": 16, "lr": 4e-3, "kl": 0.1}
ALPS = {"method": "alps"}
REFIT = {"reconstruct": 16, "lr": 5e-4, "kl": 0.9}  # little is left to restore: a small rate, a large KL weight
LONG = {"steps": 300, "batch_size": 32, "lr": 3e-3}
# How to prune, how to restore. The peak learning rate is 4e-3 (TRAIN) unless RATES has one for the adapter or the recipe
# names one: 1e-4 is the rate of the paper, 5e-4 follows a reconstruction, 3e-3 goes with longer training.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "wanda": ({}, None),
    "lora, merged": ({}, {"adapter": "lora"}),
    "hira": ({}, {"adapter": "hira"}),
    "sparselora, no KL": ({}, {"kl": 0.0}),
    "sparselora": ({}, {}),
    "sparselora, lr 1e-4": ({}, {"lr": 1e-4}),
    "sparselora-fast": ({}, {"adapter": "sparselora-fast"}),
    "masked-full": ({}, {"adapter": "masked-full"}),
    "sparselora, 300 x 32": ({}, LONG),
    "reconstruct + sparselora": ({}, REFIT),
    "alps": (ALPS, None),
    "alps, reconstruct + sparselora": (ALPS, REFIT),
}
RATES = {"masked-full": 6e-4, "hira": 4e-3, "lora": 2e-3}  # other adapters: that of TRAIN
SCENES = 300
PAIRS = (
    ("sparselora", "wanda"),
    ("sparselora", "sparselora, no KL"),
    ("sparselora", "hira"),
    ("sparselora", "masked-full"),
    ("sparselora", "lora, merged"),
    ("reconstruct + sparselora", "wanda"),
    ("reconstruct + sparselora", "sparselora"),
)
COLUMNS = ("date", "torch", "commit", "model", "setting", "recipe", "seed", *rows.SCORES, "s", "right")
HERE = Path(__file__).parent


class Bench:
    """One demo model and its scenes."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.dense, self.folder = model, MODELS[model], folder
        self.train = write(folder / "train", "train", 1200, seed=0)
        test, processor = load(self.dense, dtype="float32")
        self.test = Encoder(processor, test).usable(read(write(folder / "test", "test", SCENES, seed=7)))

    def run(self, setting: str, recipe: str, seed: int) -> dict[str, Any]:
        began = time.perf_counter()
        answered = self.dense
        if recipe != "dense":
            pruning, restoring = RECIPES[recipe]
            answered = self.folder / "pruned"
            api.prune(
                self.dense, answered, data=self.train, seed=seed, dtype="float32", overwrite=True, **SETTINGS[setting],
                **pruning,
            )  # fmt: skip
            if restoring is not None:
                sparse, answered = answered, self.folder / "restored"
                how = {**TRAIN, "lr": RATES.get(restoring.get("adapter", ""), TRAIN["lr"]), **restoring}
                api.restore(
                    sparse, answered, data=self.train, seed=seed, teacher=self.dense, teacher_mode="cached",
                    teacher_cache=self.folder / "teacher", overwrite=True, **how,
                )  # fmt: skip
                if how.get("adapter") != "lora":
                    assert not api.verify(answered, against=sparse)["differences"]
        seconds = time.perf_counter() - began
        return {**self.score(answered), "s": f"{seconds:.0f}"}

    def score(self, folder: Path) -> rows.Row:
        model, processor = load(folder, dtype="float32")
        return rows.score(model, processor, self.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        for model in asked.model:
            print(markdown(model, rows.stored(file_of(model))))
        return
    for model in asked.model:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(model, Path(folder))
            cells = [("-", "dense", 0)]
            cells += [(x, r, seed) for seed in asked.seeds for x in asked.settings for r in asked.recipes]
            there = {(row["setting"], row["recipe"], row["seed"]) for row in rows.stored(file_of(model))}
            for setting, recipe, seed in cells:
                if asked.again or (setting, recipe, str(seed)) not in there:
                    fixed = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "commit": rows.commit()}
                    cell = {"model": model, "setting": setting, "recipe": recipe, "seed": str(seed)}
                    found = {**fixed, **cell, **bench.run(setting, recipe, seed)}
                    rows.keep(found, file_of(model), COLUMNS, ("setting", "recipe", "seed"))


def file_of(model: str) -> Path:
    return HERE / f"recovery-{model}.csv"


def markdown(model: str, measured: list[rows.Row]) -> str:
    cells: dict[tuple[str, str], np.ndarray] = {}
    for setting, recipe in dict.fromkeys((row["setting"], row["recipe"]) for row in measured):
        mine = [r for r in measured if (r["setting"], r["recipe"]) == (setting, recipe)]
        cells[setting, recipe] = rows.by_scene(mine, SCENES)
    settings = [s for s in SETTINGS if any(s == setting for setting, _ in cells)]
    dense = cells["-", "dense"]
    head = f"### {model}, dense {rows.cell(dense, dense, None)}"
    lines = [head, "", f"| recipe | {' | '.join(settings)} |", f"|---|{'---:|' * len(settings)}"]
    for recipe in RECIPES:
        found = [cells.get((s, recipe)) for s in settings]
        pairs = zip(settings, found, strict=True)
        shown = ["" if x is None else rows.cell(x, dense, cells.get((s, "wanda"))) for s, x in pairs]
        if any(shown):
            lines.append(f"| {recipe} | {' | '.join(shown)} |")
    apart = [s for s in ("2:4", "70 %") if s in settings]
    titles = [f"{s}: {kind}" for s in apart for kind in ("questions", "captions")]
    lines += ["", f"| {model} | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]
    for recipe in ("dense", *RECIPES):
        found = [cells.get(("-" if recipe == "dense" else s, recipe)) for s in apart]
        if all(x is not None for x in found):
            lines.append(f"| {recipe} | {' | '.join(f'{v:.1f}' for x in found for v in x.mean((0, 1)))} |")  # type: ignore[union-attr]
    lines += ["", f"| {model}: paired differences | {' | '.join(settings)} |", f"|---|{'---:|' * len(settings)}"]
    for one, other in PAIRS:
        shown = []
        for s in settings:
            a, b = cells.get((s, one)), cells.get((s, other))
            if a is None or b is None:
                shown.append("")
                continue
            n = min(len(a), len(b))
            difference = (a[:n] - b[:n]).mean(-1)
            low, high = rows.interval(difference)
            shown.append(f"{difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append(f"| {one} over {other} | {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
