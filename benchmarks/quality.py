"""What every method, refinement, update, token rule and policy costs on the demo models, one-shot: no restoration.

Each recipe prunes vision and language of the dense model with 128 calibration samples (`propagate=block`, one sample per
training scene) and answers held-out scenes whose digits were never trained on: exact match over questions and captions,
with 95 % bootstrap intervals. `mean` is of questions and captions, its interval over scenes; `regained` the share of the
points that Wanda with the uniform policy loses that a recipe does not lose, where those are 3 points or more.

    python benchmarks/quality.py [--model instructblip llava] [--settings "50 %" "2:4"] [--recipes wanda alps] [--scenes 300]

Results: quality-MODEL.csv beside this file, one row per setting and recipe. What is there already is not measured again
unless with `--again`; a plan that cannot be met is left out. `--table` prints the files as Markdown and measures nothing.
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

from sparsight import anatomy, load
from sparsight.allocation.plan import make_plan
from sparsight.calibration.probe import Probe
from sparsight.data import Encoder, batches, read
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.demo.tour import captions_and_questions
from sparsight.errors import SparsightError
from sparsight.evaluation import bootstrap, evaluate
from sparsight.pruning.compose import policy_of
from sparsight.pruning.loop import prune
from sparsight.specs import PruneSpec

SETTINGS: dict[str, dict[str, Any]] = {
    "50 %": {"pattern": "row", "sparsity": 0.5},
    "60 %": {"pattern": "row", "sparsity": 0.6},
    "70 %": {"pattern": "row", "sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
RECIPES: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "magnitude": {"method": "magnitude"},
    "wanda": {},
    "ria": {"method": "ria"},
    "snip": {"method": "snip"},
    "fisher": {"method": "fisher"},
    "dsnot": {"method": "dsnot"},
    "dsnot-all": {"refine": "dsnot-all"},
    "wanda + swaps": {"refine": "swaps"},
    "wanda + pcg": {"update": "pcg"},
    "wanda + pcg, dense targets": {"update": "pcg", "dense_targets": True},
    "wanda + swaps + pcg": {"refine": "swaps", "update": "pcg"},
    "fisher + pcg": {"method": "fisher", "update": "pcg"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt + pcg": {"method": "sparsegpt", "update": "pcg"},
    "alps": {"method": "alps"},
    "alps, dense targets": {"method": "alps", "dense_targets": True},
    "sparsegpt, tensor": {"method": "sparsegpt", "pattern": "tensor"},
    "alps, tensor": {"method": "alps", "pattern": "tensor"},
    "wanda, layer": {"propagate": "layer"},
    "sparsegpt, layer": {"method": "sparsegpt", "propagate": "layer"},
    "wanda, dense": {"propagate": "dense"},
    "wanda, text": {"tokens": "text"},
    "wanda, image": {"tokens": "image"},
    "wanda, balanced": {"tokens": "balanced"},
    "wanda, atv": {"tokens": "atv"},
    "wanda, tamp": {"tokens": "tamp"},
    "ria + permute": {"method": "ria", "permute": True},
    "wanda, owl": {"policy": "owl"},
    "wanda, ecoflap": {"policy": "ecoflap"},
    "wanda, ecoflap-first": {"policy": "ecoflap-first"},
    "wanda, alpha": {"policy": "alpha"},
    "wanda, sensitivity": {"policy": "sensitivity"},
    "wanda, language-only": {"policy": "language-only"},
    "wanda, vision-only": {"policy": "vision-only"},
    "wanda + reconstruct 4": {"reconstruct": 4},
    "wanda + reconstruct 16": {"reconstruct": 16},
    "sparsegpt + reconstruct 16": {"method": "sparsegpt", "reconstruct": 16},
    "alps + reconstruct 16": {"method": "alps", "reconstruct": 16},
    "alps, sensitivity": {"method": "alps", "policy": "sensitivity"},
    "alps + reconstruct 16, sensitivity": {"method": "alps", "reconstruct": 16, "policy": "sensitivity"},
}
COLUMNS = [
    *("date", "torch", "model", "setting", "recipe", "scenes"),
    *("questions", "q_low", "q_high", "captions", "c_low", "c_high"),
    *("mean", "low", "high", "regained", "error", "zeros", "s"),
]
HERE = Path(__file__).parent
LOST = 3.0  # points; where Wanda loses less, the share of it that a recipe regains is noise


def fits(setting: str, recipe: dict[str, Any]) -> bool:
    """Regrouping channels is for n:m; at 2:4 and 4:8 a policy has nothing to share, and the pattern is given."""
    grouped = ":" in setting
    return not (grouped and ("policy" in recipe or "pattern" in recipe)) and (grouped or "permute" not in recipe)


class Bench:
    """One demo model, its calibration batches and its held-out scenes."""

    def __init__(self, name: str, scenes: int, folder: Path) -> None:
        self.model, self.processor = load(MODELS[name], dtype="float32")
        self.anatomy = anatomy(self.model)
        self.dense = {key: value.clone() for key, value in self.model.state_dict().items()}
        encoder = Encoder(self.processor, self.model)
        train = write(folder / f"{name}-train", "train", 128, seed=0, questions_per_scene=1)
        samples = encoder.usable(read(train, limit=128, seed=0))
        self.calibration = list(batches(samples, encoder, 8))
        self.test = encoder.usable(read(write(folder / f"{name}-test", "test", scenes, seed=7)))
        self.measure = Probe(self.model, self.anatomy, self.calibration, seed=0)

    def run(self, setting: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
        self.model.load_state_dict(self.dense)
        how = dict(recipe)
        setting = {**setting, **({"pattern": how.pop("pattern")} if "pattern" in how else {})}
        policy = policy_of(PruneSpec(method=how.get("method", "wanda"), policy=how.pop("policy", None)))
        began = time.perf_counter()
        plan = make_plan(self.anatomy, **setting, policy=policy, probe=self.measure)
        record = prune(self.model, self.anatomy, plan, self.calibration, **how)
        seconds = time.perf_counter() - began
        error = sum(record.layer_errors.values()) / max(1, len(record.layer_errors))
        zeros = sum(int((self.anatomy[n].weight == 0).sum()) for n in plan)
        layers = [x for c in ("vision", "language") for x in self.anatomy.component(c)]
        size = sum(x.weight.numel() for x in layers)
        return {**self.score(), "error": f"{error:.4f}", "zeros": f"{zeros / size:.4f}", "s": f"{seconds:.1f}"}

    def score(self) -> dict[str, Any]:
        result = evaluate(self.model, self.processor, self.test, max_new_tokens=40, batch_size=64)
        found = captions_and_questions(result)
        halves = [
            [row["scores"]["exact_match"] for row in result.predictions if (row["kind"] == "caption") == captions]
            for captions in (False, True)
        ]
        mean = sum(sum(half) / len(half) for half in halves) / 2
        questions = [(a + b) / 2 for a, b in zip(halves[0][::2], halves[0][1::2], strict=True)]  # two to a scene
        low, high = bootstrap([(q + c) / 2 for q, c in zip(questions, halves[1], strict=True)])
        cells = {"mean": mean, "low": low, "high": high}
        for key, letter in (("questions", "q"), ("captions", "c")):
            cells |= {key: found[key]["value"], f"{letter}_low": found[key]["low"], f"{letter}_high": found[key]["high"]}
        return {key: f"{100 * value:.1f}" for key, value in cells.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        print(markdown([row for name in asked.model for row in stored(name)]))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.model:
            bench = Bench(name, asked.scenes, Path(folder))
            fixed = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "model": name}
            fixed["scenes"] = asked.scenes
            keep({**fixed, "setting": "-", "recipe": "dense", **bench.score(), "zeros": "0"})
            for setting in asked.settings:
                for recipe in asked.recipes:
                    there = any((r["setting"], r["recipe"]) == (setting, recipe) for r in stored(name))
                    if not fits(setting, RECIPES[recipe]) or (there and not asked.again):
                        continue
                    try:
                        found = bench.run(SETTINGS[setting], RECIPES[recipe])
                    except SparsightError as error:
                        print(f"{name} {setting} {recipe}: {error}", flush=True)
                    else:
                        keep({**fixed, "setting": setting, "recipe": recipe, **found})


def stored(model: str) -> list[dict[str, Any]]:
    path = HERE / f"quality-{model}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def keep(row: dict[str, Any]) -> None:
    """Put a row into the file in place of its predecessor, and compute again what every recipe regained."""
    print("  ".join(f"{row.get(c, '')!s:>8}" for c in COLUMNS[2:]), flush=True)
    key = ("model", "setting", "recipe", "scenes")
    rows = [r for r in stored(row["model"]) if [str(r[k]) for k in key] != [str(row[k]) for k in key]] + [row]
    measured = [r for r in rows if r["recipe"] in ("dense", "wanda")]
    base = {(r["model"], r["setting"], str(r["scenes"])): float(r["mean"]) for r in measured}
    for r in rows:
        dense, wanda = (base.get((r["model"], s, str(r["scenes"]))) for s in ("-", r["setting"]))
        known = r["recipe"] != "dense" and dense is not None and wanda is not None and dense - wanda >= LOST
        r["regained"] = f"{100 * (float(r['mean']) - wanda) / (dense - wanda):.0f}" if known else ""
    with (HERE / f"quality-{row['model']}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = []
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model]
        dense = next(r for r in mine if r["recipe"] == "dense")
        settings = [s for s in SETTINGS if any(r["setting"] == s for r in mine)]
        lines += [f"\n### {model}, dense {dense['mean']} [{dense['low']}, {dense['high']}]\n"]
        lines += [f"| recipe | {' | '.join(settings)} |", f"|---|{'---:|' * len(settings)}"]
        for recipe in (r for r in RECIPES if any(row["recipe"] == r for row in mine)):
            cells = []
            for setting in settings:
                row = next((r for r in mine if (r["setting"], r["recipe"]) == (setting, recipe)), None)
                regained = f" ({row['regained']} %)" if row and row["regained"] and int(row["regained"]) > -100 else ""
                cells.append(f"{row['mean']} [{row['low']}, {row['high']}]{regained}" if row else "")
            lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
