"""Scores of runs with intervals, and differences between them.

The score of a run is exact match: the mean of questions and captions where it answered both (a caption is a sample of
kind "caption"), else over all samples; or any other metric by name. Several seeds of the same run are averaged. The 95 %
interval is the bootstrap's (Efron, 1979), percentiles of 2000 draws: samples are drawn again, questions and captions
each among themselves, the same draw for all seeds, and the seeds are drawn again, too; so it covers samples and seeds.
With one seed it is about samples alone. Samples count as independent; several questions about one image are not quite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sparsight.evaluate.evaluate import ALL
from sparsight.report.runs import Group, Run

DRAWS = 2000
LEVEL = 0.95
CAPTION = "caption"
QUESTIONS, CAPTIONS = "questions", "captions"  # parts: exact match of one of the two
SCALES = {"exact_match": ("exact match, %", 100.0), "vqa_accuracy": ("VQA accuracy, %", 100.0), "cider_d": ("CIDEr-D", 1.0)}
SCALES["token_accuracy"] = ("token accuracy, %", 100.0)


@dataclass(frozen=True)
class Estimate:
    """A mean in the metric's own unit, its 95 % interval (None where it cannot be told), samples and seeds behind it."""

    value: float
    low: float | None
    high: float | None
    n: int
    seeds: int = 1


def axis(metric: str | None) -> tuple[str, float]:
    """What to write on an axis, and the factor that makes it so."""
    return SCALES.get(metric or "exact_match", ((metric or "").replace("_", " "), 1.0))


def estimate(runs: Sequence[Run] | Group, metric: str | None = None, part: str | None = None) -> Estimate | None:
    """The mean over seeds of a metric, with its interval; of `part` "questions" or "captions" only, if one is named.

    None if a run was not scored by it. Runs without predictions give the mean of their rows, and an interval if it is one.
    """
    runs = runs.runs if isinstance(runs, Group) else runs
    scored = [_strata(run, metric, part) for run in runs]
    if any(strata is None for strata in scored):
        return _from_rows(runs, metric, part)
    same = len({_asked(run) for run in runs}) == 1
    means = [np.mean([values.mean() for values in strata]) for strata in scored if strata]
    draws = np.stack([_drawn(strata, 0 if same else i) for i, strata in enumerate(scored) if strata])  # (seeds, draws)
    low, high = _interval(draws)
    return Estimate(float(np.mean(means)), low, high, sum(len(values) for values in scored[0] or ()), len(runs))


def difference(runs: Group, others: Group, metric: str | None = None) -> Estimate | None:
    """By how much `runs` score above `others` on the same samples: a paired interval. None where samples differ.

    Seeds are paired where both have them; else each is set against the mean of the others.
    """
    if len({_asked(run) for run in (*runs.runs, *others.runs)}) != 1:
        return None
    ours = {run.seed: _strata(run, metric) for run in runs.runs}
    theirs = {run.seed: _strata(run, metric) for run in others.runs}
    if any(strata is None for strata in (*ours.values(), *theirs.values())):
        return None
    paired = [seed for seed in ours if seed in theirs] if len(theirs) > 1 else []
    parts = range(len(next(iter(ours.values())) or ()))
    mean = [np.mean([strata[k] for strata in theirs.values() if strata], axis=0) for k in parts]
    apart = [
        [strata[k] - ((theirs[seed] or mean)[k] if seed in paired else mean[k]) for k in parts]
        for seed, strata in ours.items()
        if strata and (seed in paired or not paired)
    ]
    draws = np.stack([_drawn(strata, 0) for strata in apart])
    low, high = _interval(draws)
    value = float(np.mean([np.mean([values.mean() for values in strata]) for strata in apart]))
    return Estimate(value, low, high, sum(len(values) for values in apart[0]), len(apart))


def both_kinds(run: Run) -> bool:
    """Whether a run answered questions and captions."""
    kinds = {row["kind"] for row in run.predictions} or {row["kind"] for row in run.scores} - {ALL}
    return CAPTION in kinds and len(kinds) > 1


def same_samples(runs: Sequence[Run]) -> bool:
    """Whether all have predictions, and of the same samples."""
    return all(run.predictions for run in runs) and len({_asked(run) for run in runs}) == 1


@lru_cache(maxsize=1024)
def _asked(run: Run) -> int:
    """What tells the samples of one run from those of another."""
    return hash(tuple((row["id"], row["kind"], row["prompt"], tuple(row["answers"])) for row in run.predictions))


def _strata(run: Run, metric: str | None, part: str | None = None) -> list[np.ndarray] | None:
    """The values of a metric, one array (n,), or two where the score is a mean of two; None if the run has none."""
    name = metric or "exact_match"
    rows = [row for row in run.predictions if name in row["scores"]]
    asked = [row["scores"][name] for row in rows if row["kind"] != CAPTION]
    described = [row["scores"][name] for row in rows if row["kind"] == CAPTION]
    if part:
        chosen = [asked if part == QUESTIONS else described]
    elif metric is None and asked and described:
        chosen = [asked, described]
    else:
        chosen = [[row["scores"][name] for row in rows]]
    return [np.asarray(values, dtype=np.float64) for values in chosen] if all(chosen) else None


def _drawn(strata: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """The mean of every draw, (draws,)."""
    drawn = [_weights(len(values), seed + 1000 * k) @ values for k, values in enumerate(strata)]
    return np.mean(drawn, axis=0)


@lru_cache(maxsize=8)
def _weights(n: int, seed: int) -> np.ndarray:
    """How much each of n samples counts in each draw, (draws, n); the draws are those of `evaluate.bootstrap`."""
    generator = np.random.default_rng(seed)
    weights = np.empty((DRAWS, n), dtype=np.float32)
    for i in range(DRAWS):
        weights[i] = np.bincount(generator.integers(0, n, n), minlength=n) / n
    return weights


def _interval(draws: np.ndarray) -> tuple[float, float]:
    """The interval of the mean over seeds of `draws` (seeds, draws), the seeds drawn again."""
    seeds, n = draws.shape
    if seeds > 1:
        chosen = np.random.default_rng(1).integers(0, seeds, (seeds, n))
        draws = np.take_along_axis(draws, chosen, axis=0)
    low, high = np.quantile(draws.mean(0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _from_rows(runs: Sequence[Run], metric: str | None, part: str | None) -> Estimate | None:
    found = [_row(run, metric or "exact_match", part, both=metric is None and both_kinds(run)) for run in runs]
    if not found or any(row is None for row in found):
        return None
    rows = [row for row in found if row]
    if len(rows) == 1:
        return rows[0]
    return Estimate(float(np.mean([row.value for row in rows])), None, None, rows[0].n, len(rows))


def _row(run: Run, name: str, part: str | None, both: bool) -> Estimate | None:
    """A metric as the evaluation's rows have it."""
    rows = [row for row in run.scores if row["metric"] == name]
    total = next((row for row in rows if row["kind"] == ALL), None)
    if not part and not both:
        return Estimate(total["value"], total["low"], total["high"], total["n"]) if total else None
    sides = {QUESTIONS: [], CAPTIONS: []}  # type: dict[str, list]
    for row in rows:
        if row["kind"] != ALL:
            sides[CAPTIONS if row["kind"] == CAPTION else QUESTIONS].append(row)
    means = []
    for side in [part] if part else list(sides):
        n = sum(row["n"] for row in sides[side])
        if not n:
            return None
        means.append(sum(row["value"] * row["n"] for row in sides[side]) / n)
    only = sides[part][0] if part and len(sides[part]) == 1 else {"low": None, "high": None}
    return Estimate(float(np.mean(means)), only["low"], only["high"], sum(row["n"] for row in rows if row["kind"] != ALL))
