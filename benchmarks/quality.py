"""What every method, refinement, update, token rule and policy costs on the demo models, one-shot: no restoration.

Each recipe prunes vision and language of the dense model with 128 calibration samples (`propagate=block`, drawn from those
of 1,200 training scenes) and answers held-out scenes whose digits were never trained on: exact match over questions and
captions, and the perplexity of the right answers. A seed draws the calibration samples and what is random in a method.

    python benchmarks/quality.py [--model instructblip llava] [--settings "50 %" "2:4"] [--recipes wanda alps] [--seeds 0 1]

Results: quality-MODEL.csv beside this file, one row per setting, recipe and seed. What is there already is not measured
again unless with `--again`; a plan that cannot be met is left out. `--table` prints the files as Markdown and measures
nothing: means with 95 % bootstrap intervals over seeds and scenes, and in parentheses the share of the points lost by Wanda
with the uniform policy that a recipe regains, where those are 3 points or more and the share is above -100 %.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path
from typing import Any

import rows
import torch

from sparsight import anatomy, load
from sparsight.allocation.plan import make_plan
from sparsight.calibration.probe import Probe
from sparsight.data import Encoder, batches, read
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.errors import SparsightError
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
COLUMNS = ("date", "torch", "commit", "model", "setting", "recipe", "seed", *rows.SCORES, "error", "zeros", "s", "right")
HERE = Path(__file__).parent
SCENES = 300


def fits(setting: str, recipe: dict[str, Any]) -> bool:
    """Regrouping channels is for n:m; at 2:4 and 4:8 a policy has nothing to share, and the pattern is given."""
    grouped = ":" in setting
    return not (grouped and ("policy" in recipe or "pattern" in recipe)) and (grouped or "permute" not in recipe)


class Bench:
    """One demo model, its calibration batches and its held-out scenes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.model, self.processor = load(MODELS[name], dtype="float32")
        self.anatomy = anatomy(self.model)
        self.dense = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.encoder = Encoder(self.processor, self.model)
        self.train = write(folder / f"{name}-train", "train", 1200, seed=0, questions_per_scene=1)
        self.test = self.encoder.usable(read(write(folder / f"{name}-test", "test", SCENES, seed=7)))

    def draw(self, seed: int) -> None:
        """Take other calibration samples."""
        self.model.load_state_dict(self.dense)
        samples = self.encoder.usable(read(self.train, limit=128, seed=seed))
        self.calibration, self.seed = list(batches(samples, self.encoder, 8)), seed
        self.measure = Probe(self.model, self.anatomy, self.calibration, seed=seed)

    def run(self, setting: dict[str, Any], recipe: dict[str, Any]) -> rows.Row:
        self.model.load_state_dict(self.dense)
        how = dict(recipe)
        setting = {**setting, **({"pattern": how.pop("pattern")} if "pattern" in how else {})}
        policy = policy_of(PruneSpec(method=how.get("method", "wanda"), policy=how.pop("policy", None)))
        began = time.perf_counter()
        plan = make_plan(self.anatomy, **setting, policy=policy, probe=self.measure)
        record = prune(self.model, self.anatomy, plan, self.calibration, seed=self.seed, **how)
        seconds = time.perf_counter() - began
        error = sum(record.layer_errors.values()) / max(1, len(record.layer_errors))
        zeros = sum(self.anatomy[n].zeros for n in plan)
        layers = [x for c in ("vision", "language") for x in self.anatomy.component(c)]
        size = sum(x.weight.numel() for x in layers)
        return {**self.score(), "error": f"{error:.4f}", "zeros": f"{zeros / size:.4f}", "s": f"{seconds:.1f}"}

    def score(self) -> rows.Row:
        return rows.score(self.model, self.processor, self.test)


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
        print("\n".join(markdown(name, rows.stored(file_of(name))) for name in asked.model))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.model:
            bench = Bench(name, Path(folder))
            keep_row(name, "-", "dense", 0, bench.score() | {"zeros": "0"})
            for seed in asked.seeds:
                bench.draw(seed)
                there = {(r["setting"], r["recipe"], r["seed"]) for r in rows.stored(file_of(name))}
                for setting, recipe in ((s, r) for s in asked.settings for r in asked.recipes):
                    if not fits(setting, RECIPES[recipe]) or ((setting, recipe, str(seed)) in there and not asked.again):
                        continue
                    try:
                        found = bench.run(SETTINGS[setting], RECIPES[recipe])
                    except SparsightError as error:
                        print(f"{name} {setting} {recipe}: {error}", flush=True)
                    else:
                        keep_row(name, setting, recipe, seed, found)


def file_of(model: str) -> Path:
    return HERE / f"quality-{model}.csv"


def keep_row(model: str, setting: str, recipe: str, seed: int, found: rows.Row) -> None:
    row = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "commit": rows.commit(), "model": model}
    row |= {"setting": setting, "recipe": recipe, "seed": str(seed), **found}
    rows.keep(row, file_of(model), COLUMNS, ("setting", "recipe", "seed"))


def markdown(model: str, measured: list[rows.Row]) -> str:
    """Two tables: scores with intervals, and the perplexity of the right answers."""
    cells: dict[tuple[str, str], list[rows.Row]] = {}
    for row in measured:
        cells.setdefault((row["setting"], row["recipe"]), []).append(row)
    scores = {key: rows.by_scene(some, SCENES) for key, some in cells.items()}
    dense = scores["-", "dense"]
    text = {key: sum(float(row["perplexity"]) for row in some) / len(some) for key, some in cells.items()}
    settings = [s for s in SETTINGS if any(s == setting for setting, _ in cells)]
    recipes = [r for r in RECIPES if any(r == recipe for _, recipe in cells)]
    head = [f"| recipe | {' | '.join(settings)} |", f"|---|{'---:|' * len(settings)}"]
    lines = [f"#### {model}, dense {rows.cell(dense, dense, None)}", "", *head]
    for recipe in recipes:
        found = [(scores.get((s, recipe)), scores.get((s, "wanda"))) for s in settings]
        lines.append(f"| {recipe} | {' | '.join('' if x is None else rows.cell(x, dense, wanda) for x, wanda in found)} |")
    lines += ["", f"#### {model}, perplexity of the answers, dense {text['-', 'dense']:.4f}", "", *head]
    for recipe in recipes:
        values = [text.get((s, recipe)) for s in settings]
        lines.append(
            f"| {recipe} | {' | '.join('' if x is None else f'{x:.4f}' if x < 10 else f'{x:.4g}' for x in values)} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
