"""Nine cells of a fixed sum: one sweep, against nine `prune` and nine `eval` commands; and search against the grid's best.

The sweep and the commands do the same work with the same settings (propagate dense) and must find the same answers.
Times are of whole commands, one thread, in one run. `--search` takes the best cell of recipes/figures/fixed-sum.yaml from
FOLDER/MODEL-fixed-sum (see benchmarks/claims.py), gives `search` the same number of zeros, split alike, and sets its
answers against the best cell's, for every sum and seed. Neither counts the evaluation of the dense model.

    python benchmarks/sweep.py [--models llava instructblip]
    python benchmarks/sweep.py --search FOLDER
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sparsight import api
from sparsight.demo import MODELS
from sparsight.demo.scenes import scene_folder

COMMAND = [sys.executable, "-m", "sparsight"]
VISION = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
EVALUATE = {"max_new_tokens": 40, "batch_size": 64}


def call(*words: object) -> None:
    done = subprocess.run([*COMMAND, *map(str, words), "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def nine(model: str) -> list[str]:
    train, test = scene_folder("train"), scene_folder("test")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        recipe = {
            "model": str(MODELS[model]), "data": str(train), "held_out": str(test), "dtype": "float32",
            "evaluate": EVALUATE, "prune": {"batch_size": 32},
            "grid": {"sparsity": {"sum": 1.0, "vision": VISION}},
        }  # fmt: skip
        (home / "nine.yaml").write_text(json.dumps(recipe))
        began = time.perf_counter()
        call("sweep", home / "nine.yaml", home / "swept")
        swept = time.perf_counter() - began
        began = time.perf_counter()
        for vision in VISION:
            sparsity = f"vision={vision},language={round(1 - vision, 10)}"
            out = home / f"{vision}"
            call("prune", MODELS[model], out, "--data", train, "--sparsity", sparsity, "--propagate", "dense",
                 "--batch-size", 32, "--dtype", "float32")  # fmt: skip
            call("eval", out, "--data", test, "--max-new-tokens", 40, "--batch-size", 64, "--dtype", "float32",
                 "--predictions", home / f"{vision}.jsonl")  # fmt: skip
        apart = time.perf_counter() - began
        cells = [json.loads(path.read_text()) for path in (home / "swept" / "cells").glob("*.json")]
        answers = {c["cell"]["sparsity"].get("vision"): home / "swept" / "cells" / f"{c['id']}.jsonl" for c in cells}
        same = all((home / f"{v}.jsonl").read_text() == answers[v].read_text() for v in VISION)
    print(
        f"{model}: sweep {swept:.0f} s, nine commands each {apart:.0f} s: {swept / apart:.2f} (bar: 0.6), "
        f"same answers: {same}"
    )
    return [model, f"{swept:.1f}", f"{apart:.1f}", f"{swept / apart:.3f}", str(same)]


def searched(model: str, folder: Path) -> list[list[str]]:
    with (folder / f"{model}-fixed-sum" / "results.csv").open() as file:
        cells = [row for row in csv.DictReader(file) if row["seed"]]
    rows = []
    for total in (1.0, 1.2):
        for seed in (0, 1, 2):
            these = [
                r for r in cells if int(r["seed"]) == seed and abs(float(r["vision"]) + float(r["language"]) - total) < 0.01
            ]
            best = max(these, key=lambda r: float(r["exact_match"]))
            body = api.inspect(MODELS[model])
            size = sum(x.weight.numel() for c in ("vision", "language") for x in body.component(c))
            with tempfile.TemporaryDirectory() as out:
                found = api.search(
                    MODELS[model], Path(out) / "found", data=scene_folder("train"), held_out=scene_folder("test"),
                    sparsity=int(best["zeros"]) / size, propagate="block", batch_size=32, max_new_tokens=40, seed=seed,
                    dtype="float32",
                )  # fmt: skip
            score = found.chosen_score["value"]
            split = " : ".join(f"{100 * float(best[c]):.0f}" for c in ("vision", "language"))
            chosen = " : ".join(f"{100 * amount:.1f}" for amount in found.chosen.components.values())
            rows.append([
                model, f"{total:.0%}", str(seed), split, f"{100 * float(best['exact_match']):.1f}", chosen,
                f"{100 * score:.1f}", str(found.evaluations - 1), str(len(these)),
            ])  # fmt: skip
            print("  ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--search", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    if asked.search:
        name, columns = (
            "search",
            ("model", "sum", "seed", "best cell", "its score", "found", "score", "evaluations", "cells"),
        )
        rows = [row for model in asked.models for row in searched(model, asked.search)]
    else:
        name, columns = "sweep", ("model", "sweep s", "apart s", "ratio", "same answers")
        rows = [nine(model) for model in asked.models]
    today = str(datetime.date.today())
    with Path(__file__).with_name(f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("date", "torch", *columns), *([today, torch.__version__, *row] for row in rows)])


if __name__ == "__main__":
    main()
