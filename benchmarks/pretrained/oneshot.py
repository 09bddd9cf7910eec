"""What one-shot pruning costs the model that `build.py` made: exact match on held-out questions, perplexity of its text.

Vision and language are pruned alike, in float32 or as `--dtype` says, with 64 samples of `calibration.jsonl` (three of
four are questions and captions about photos, the rest passages of text); `--components language` prunes the language model
alone. A row is measured on 200 of the held-out questions, drawn by a seed, and on 64 of the held-out passages.

    python benchmarks/pretrained/oneshot.py MODEL [--settings "60 %" "2:4"] [--recipes wanda alps] [--components language]

Results: oneshot.csv beside this file. A row that is there already is not measured again; remove it to measure it again.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import torch
from measure import CPU, Measure, keep, stored, zeros

import sparsight

SETTINGS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "70 %": {"sparsity": 0.7},
    "80 %": {"sparsity": 0.8},
    "2:4": {"pattern": "2:4"},
}
RECIPES: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt + reconstruct 4": {"method": "sparsegpt", "reconstruct": 4},
    "wanda + swaps + pcg": {"refine": "swaps", "update": "pcg"},
    "wanda + pcg": {"update": "pcg"},
    "wanda + pcg, dense targets": {"update": "pcg", "dense_targets": True},
    "wanda + reconstruct 4": {"reconstruct": 4},
    "alps": {"method": "alps"},
    "alps, sensitivity": {"method": "alps", "policy": "sensitivity"},
    "alps + reconstruct 4": {"method": "alps", "reconstruct": 4},
}
COLUMNS = (
    *("date", "torch", "cpu", "dtype", "components", "setting", "recipe", "samples", "questions", "passages"),
    *("exact", "low", "high", "perplexity", "zeros", "error", "prune_s", "measure_s"),
)
FILE = Path(__file__).with_name("oneshot.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=["60 %", "2:4", "50 %", "70 %", "80 %"])
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--components", nargs="+", choices=("vision", "language"), default=["vision", "language"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--passages", type=int, default=64)
    given = parser.parse_args()
    fixed = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    size = {"cpu": CPU, "dtype": given.dtype}
    size |= {name: str(getattr(given, name)) for name in ("samples", "questions", "passages")}
    size["components"] = "+".join(given.components)
    cells = [("-", "dense"), *((setting, recipe) for setting in given.settings for recipe in given.recipes)]
    for setting, recipe in cells:
        key = {**size, "setting": setting, "recipe": recipe}
        there = any(all(row[name] == value for name, value in key.items()) for row in stored(FILE))
        if there or (":" in setting and "policy" in RECIPES.get(recipe, {})):
            continue
        try:
            found = run(given, setting, recipe)
        except sparsight.SparsightError as error:
            print(f"{setting} {recipe}: {error}", flush=True)
        else:
            keep({**fixed, **key, **found}, FILE, COLUMNS)


def run(given: argparse.Namespace, setting: str, recipe: str) -> dict[str, str]:
    """Prune a fresh copy of the model, and measure it."""
    model, processor = sparsight.load(given.model, dtype=given.dtype)
    measure = Measure(given.model, processor, given.questions, given.passages)
    cells = {}
    if recipe != "dense":
        left = tuple(component for component in ("vision", "language") if component not in given.components)
        how = {**SETTINGS[setting], **RECIPES[recipe], "ignore": left}
        if recipe != "magnitude":  # which needs no data
            data = given.model / "data" / "calibration.jsonl"
            how |= {"data": data, "processor": processor, "samples": given.samples}
        began = time.perf_counter()
        record = sparsight.prune(model, **how)
        cells = {"prune_s": f"{time.perf_counter() - began:.0f}", "zeros": f"{zeros(model, given.components):.4f}"}
        errors = record.layer_errors
        cells |= {"error": f"{sum(errors.values()) / len(errors):.4f}"} if errors else {}
    began = time.perf_counter()
    scores = measure(model)
    return {**cells, **scores, "measure_s": f"{time.perf_counter() - began:.0f}"}


if __name__ == "__main__":
    main()
