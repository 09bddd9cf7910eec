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

from sparsight.errors import SparsightError
from sparsight.evaluation.evaluate import ALL
from sparsight.evaluation.metrics import TOKEN_METRICS, axis_of, title_of
from sparsight.reporting.groups import Group
from sparsight.reporting.runs import ScoredModel

DRAWS = 2000
LEVEL = 0.95
CAPTION = "caption"
QUESTIONS, CAPTIONS = "questions", "captions"  # parts: exact match of one of the two


@dataclass(frozen=True)
class Estimate:
    """A mean in the metric's own unit, its 95 % interval (None where there is none), and its samples and seeds."""

    value: float
    low: float | None
    high: float | None
    n: int
    seeds: int = 1


def axis(metric: str | None) -> tuple[str, float]:
    """The title of a metric's axis, with its unit, and the factor from the metric's own unit to that of the axis."""
    return axis_of(metric or "exact_match")


def metric_name(metric: str | None) -> str:
    """The title of a metric without its unit."""
    return title_of(metric or "exact_match")[0]


def main_metric(groups: Sequence[Group], metric: str | None) -> str | None:
    """The metric to compare runs by: `metric`, else exact match (None), else the first that they were scored by.

    **Raises** `SparsightError` for runs without a score, and for a metric that none was scored by.
    """
    recorded = dict.fromkeys(row["metric"] for group in groups for run in group.runs for row in run.scores)
    others = sorted(recorded, key=lambda name: name in TOKEN_METRICS)  # those of answers first
    if metric is None and "exact_match" not in recorded and others:
        return others[0]
    if not any(estimate(group, metric) for group in groups):
        advice = (
            f"they were scored by {', '.join(recorded)}"
            if recorded
            else "run sparsight eval MODEL --data DATA --record first"
        )
        raise SparsightError(f"none of the {len(groups)} runs was scored by {metric_name(metric)}; {advice}")
    return metric


def estimate(runs: Sequence[ScoredModel] | Group, metric: str | None = None, part: str | None = None) -> Estimate | None:
    """The mean over seeds of a metric, with its interval; of `part` "questions" or "captions" only, if one is named.

    None if a run was not scored by it. Runs without predictions give the mean of their rows, and an interval if it is one.
    """
    runs = runs.runs if isinstance(runs, Group) else runs
    seeds = [strata for run in runs if (strata := _strata(run, metric, part))]
    if len(seeds) < len(runs):
        return _from_rows(runs, metric, part)
    return _mean(seeds, paired=len({run.samples_key for run in runs}) == 1)


def difference(group: Group, other: Group, metric: str | None = None) -> Estimate | None:
    """The score of `group` less that of `other` on the same samples, with a paired interval; None where samples differ.

    Seeds are paired where both have them; else each is set against the mean of the other group.
    """
    if len({run.samples_key for run in (*group.runs, *other.runs)}) != 1:
        return None
    ours = {run.seed: strata for run in group.runs if (strata := _strata(run, metric))}
    theirs = {run.seed: strata for run in other.runs if (strata := _strata(run, metric))}
    if len(ours) < len(group.runs) or len(theirs) < len(other.runs):
        return None
    mean = [np.mean(values, axis=0) for values in zip(*theirs.values(), strict=True)]
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs] if len(theirs) > 1 else []
    pairs = pairs or [(strata, mean) for strata in ours.values()]
    return _mean([[x - y for x, y in zip(*pair, strict=True)] for pair in pairs], paired=True)


def _mean(seeds: Sequence[Sequence[np.ndarray]], paired: bool) -> Estimate:
    """The mean over seeds of the mean over strata; `paired` seeds have the same samples, and draw the same."""
    draws = []
    for i, strata in enumerate(seeds):
        start = 0 if paired else i
        draws.append(np.mean([_weights(len(values), start + 1000 * k) @ values for k, values in enumerate(strata)], axis=0))
    low, high = _interval(np.stack(draws))
    value = float(np.mean([np.mean([values.mean() for values in strata]) for strata in seeds]))
    return Estimate(value, low, high, sum(len(values) for values in seeds[0]), len(seeds))


def has_both_kinds(run: ScoredModel) -> bool:
    """Whether a run answered questions and captions."""
    kinds = {row["kind"] for row in run.predictions} or {row["kind"] for row in run.scores} - {ALL}
    return CAPTION in kinds and len(kinds) > 1


def _strata(run: ScoredModel, metric: str | None, part: str | None = None) -> list[np.ndarray] | None:
    """The values of a metric, one array (n,), or two where the score is a mean of two; None if the run has none."""
    name = metric or "exact_match"
    rows = [row for row in run.predictions if name in row["scores"]]
    questions = [row["scores"][name] for row in rows if row["kind"] != CAPTION]
    captions = [row["scores"][name] for row in rows if row["kind"] == CAPTION]
    if part:
        strata = [questions if part == QUESTIONS else captions]
    elif metric is None and questions and captions:
        strata = [questions, captions]
    else:
        strata = [[row["scores"][name] for row in rows]]
    return [np.asarray(values, dtype=np.float64) for values in strata] if all(strata) else None


@lru_cache(maxsize=8)
def _weights(n: int, seed: int) -> np.ndarray:
    """The weight of each of n samples in each draw, (draws, n); the draws are those of `evaluation.bootstrap`."""
    generator = np.random.default_rng(seed)
    weights = np.empty((DRAWS, n), dtype=np.float32)
    for i in range(DRAWS):
        weights[i] = np.bincount(generator.integers(0, n, n), minlength=n) / n
    return weights


def _interval(draws: np.ndarray) -> tuple[float, float]:
    """The interval of the mean over seeds of `draws` (seeds, draws), the seeds drawn again."""
    seeds, n = draws.shape
    if seeds > 1:
        indices = np.random.default_rng(1).integers(0, seeds, (seeds, n))
        draws = np.take_along_axis(draws, indices, axis=0)
    low, high = np.quantile(draws.mean(0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _from_rows(runs: Sequence[ScoredModel], metric: str | None, part: str | None) -> Estimate | None:
    rows = [row for run in runs if (row := _row(run, metric, part))]
    if len(rows) < len(runs):
        return None
    if len(rows) == 1:
        return rows[0]
    return Estimate(float(np.mean([row.value for row in rows])), None, None, rows[0].n, len(rows))


def _row(run: ScoredModel, metric: str | None, part: str | None) -> Estimate | None:
    """A metric as the rows of the evaluation have it, those of its kinds weighted by their samples."""
    rows = [row for row in run.scores if row["metric"] == (metric or "exact_match")]
    if not part and (metric is not None or not has_both_kinds(run)):
        sides = [[row for row in rows if row["kind"] == ALL][:1]]
    else:
        rows = [row for row in rows if row["kind"] != ALL]
        names = [part] if part else [QUESTIONS, CAPTIONS]
        sides = [[row for row in rows if (row["kind"] == CAPTION) == (name == CAPTIONS)] for name in names]
    counts = [sum(row["n"] for row in side) for side in sides]
    if not all(counts):
        return None
    if len(sides) == 1 and len(sides[0]) == 1:
        row = sides[0][0]
        return Estimate(row["value"], row["low"], row["high"], row["n"])
    means = [sum(row["value"] * row["n"] for row in side) / n for side, n in zip(sides, counts, strict=True)]
    return Estimate(float(np.mean(means)), None, None, sum(counts))
