"""The rows of the benchmarks on the demo models: scores on held-out scenes, their files, and means over seeds and scenes.

A row's `right` says in hexadecimal which answers were right: of each scene its two questions and its caption.
"""

from __future__ import annotations

import csv
import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.evaluation import evaluate

SCORES = ("questions", "captions", "mean", "perplexity")
LOST = 3.0  # points; where Wanda loses less, the share of it that a recipe regains is noise
Row = dict[str, str]


def score(model: Any, processor: Any, test: Any) -> Row:
    """Exact match in percent on held-out scenes, the mean of questions and captions, and the perplexity of the answers."""
    settings: dict[str, Any] = {"metrics": ("exact_match", "perplexity"), "max_new_tokens": 40, "batch_size": 64}
    result = evaluate(model, processor, test, **settings)
    right = np.array([row["correct"] for row in result.predictions])
    captions = np.array([row["kind"] == "caption" for row in result.predictions])
    q, c = 100 * right[~captions].mean(), 100 * right[captions].mean()
    found = {"questions": f"{q:.1f}", "captions": f"{c:.1f}", "mean": f"{(q + c) / 2:.1f}"}
    return {**found, "perplexity": f"{result.value('perplexity'):.4f}", "right": np.packbits(right).tobytes().hex()}


@functools.cache
def commit() -> str:
    """The commit that is measured."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def stored(file: Path) -> list[Row]:
    """The rows of a file, none if it is not there."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        found = list(csv.DictReader(lines))
    if not all("right" in row and "seed" in row for row in found):
        raise SystemExit(f"{file}: was written by an earlier version of the benchmark; move it away and measure again")
    return found


def keep(row: Row, file: Path, columns: Sequence[str], key: Sequence[str]) -> None:
    """Put a row into a file in place of the one with the same `key`, and print it."""
    print("  ".join(f"{row.get(c, ''):>8}" for c in columns if c != "right"), flush=True)
    rows = [r for r in stored(file) if [r[k] for k in key] != [row[k] for k in key]] + [row]
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def by_scene(rows: Sequence[Row], scenes: int) -> np.ndarray:
    """Scores (seeds, scenes, 2) in percent: of each scene its two questions and its caption."""
    packed = [np.frombuffer(bytes.fromhex(row["right"]), dtype=np.uint8) for row in rows]
    right = 100.0 * np.stack([np.unpackbits(bits)[: 3 * scenes].reshape(scenes, 3) for bits in packed])
    return np.stack([right[..., :2].mean(-1), right[..., 2]], axis=-1)


def interval(scores: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % of the means of `scores` (seeds, scenes) when seeds and scenes are drawn again."""
    g = np.random.default_rng(0)
    seeds, scenes = scores.shape
    means = [
        scores[g.integers(0, seeds, seeds)][:, g.integers(0, scenes, scenes)].mean() for _ in range(draws)
    ]  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def cell(scores: np.ndarray, dense: np.ndarray, pruned: np.ndarray | None) -> str:
    """Mean over seeds with its interval, and the share regained of the points that Wanda lost."""
    mean = scores.mean()
    low, high = interval(scores.mean(-1))
    lost = 0.0 if pruned is None else dense.mean() - pruned.mean()
    known = pruned is not None and lost >= LOST and mean != pruned.mean()
    share = round(100 * (mean - pruned.mean()) / lost) if known and pruned is not None else -100
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" + (f" ({share} %)" if share > -100 else "")
