"""From a model and samples to a table of metrics with intervals, and every prediction."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsight.data.batching import batches
from sparsight.data.encoding import Encoder
from sparsight.data.sample import Sample
from sparsight.errors import SparsightError
from sparsight.evaluate.answers import foresee
from sparsight.evaluate.bootstrap import bootstrap
from sparsight.evaluate.cider import cider_d
from sparsight.evaluate.exact import exact_match
from sparsight.evaluate.generate import Progress, predict
from sparsight.evaluate.vqa import vqa_accuracy

Metric = Callable[[str, Sequence[str]], float]  # (prediction, answers) -> score
Scores = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]  # the same for many samples at once

ALL = "all"
COLUMNS = ("kind", "metric", "value", "low", "high", "n")


def _each(metric: Metric) -> Scores:
    def scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
        return [float(metric(prediction, given)) for prediction, given in zip(predictions, answers, strict=True)]

    return scores


METRICS: dict[str, Scores] = {
    "exact_match": _each(exact_match),
    "vqa_accuracy": _each(vqa_accuracy),
    "cider_d": cider_d,
}
QUESTION = ("exact_match", "vqa_accuracy")
CAPTION = ("cider_d", "exact_match")


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    `rows` has one {kind, metric, value, low, high, n} per metric, first over "all" samples that the metric is for, then
    per kind where there are several; low and high are a 95 % bootstrap interval over samples, None for the measures of
    tokens. `predictions` has one {id, kind, prompt, prediction, answers, correct, scores} per sample, in order.
    `skipped` counts the broken samples that were left out.
    """

    rows: tuple[dict[str, Any], ...]
    predictions: tuple[dict[str, Any], ...]
    skipped: int = 0

    def value(self, metric: str, kind: str = ALL) -> float:
        """Look one value up."""
        for row in self.rows:
            if (row["metric"], row["kind"]) == (metric, kind):
                return row["value"]
        have = ", ".join(f"{row['metric']} ({row['kind']})" for row in self.rows)
        raise SparsightError(f"no metric {metric!r} of kind {kind!r}; there are {have}")

    def table(self) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        """Give the columns' names and the rows' values."""
        return COLUMNS, [tuple(row[column] for column in COLUMNS) for row in self.rows]

    def to_json(self) -> str:
        """Write the rows as JSON text; the same result gives the same bytes."""
        facts = {"metrics": list(self.rows), "skipped": self.skipped}
        return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"

    def write_predictions(self, path: str | Path) -> None:
        """Write the predictions as JSONL, one sample a line."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.predictions)
        Path(path).write_text("".join(lines), encoding="utf-8")


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    metrics: Mapping[str, Sequence[str | Metric]] | Sequence[str | Metric] | None = None,
    batch_size: int = 32,
    beams: int = 1,
    max_new_tokens: int = 32,
    answers: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Ask the model every sample's last question and score what it writes.

    `metrics` are names in `METRICS` or functions (prediction, answers) -> score, for all samples or by kind. By default
    samples of kind "caption" get CIDEr-D and exact match, all others exact match and VQA accuracy. With `answers` the
    right answers are measured token by token, too. `seed` is the bootstrap's.
    """
    if not samples:
        raise SparsightError("nothing to evaluate: no samples")
    kinds = list(dict.fromkeys(sample.kind for sample in samples))
    if ALL in kinds:
        raise SparsightError(f"no sample can be of kind {ALL!r}: that row is of all samples together")
    chosen = {kind: _choose(metrics, kind) for kind in kinds}
    written = predict(
        model, processor, samples, batch_size=batch_size, beams=beams, max_new_tokens=max_new_tokens, progress=progress
    )
    scores: list[dict[str, float]] = [{} for _ in samples]
    for kind in kinds:
        members = [i for i, sample in enumerate(samples) if sample.kind == kind]
        for name, score in chosen[kind].items():
            given = score([written[i] for i in members], [samples[i].answers for i in members])
            for i, value in zip(members, given, strict=True):
                scores[i][name] = value
    rows = _rows([sample.kind for sample in samples], scores, seed)
    if answers:
        found = foresee(model, batches(samples, Encoder(processor, model), batch_size))
        n = int(found.pop("tokens"))
        rows += [_row(ALL, name, value, None, n) for name, value in found.items()]
    predictions = [
        {
            "id": sample.id, "kind": sample.kind, "prompt": sample.prompt, "prediction": text,
            "answers": list(sample.answers), "correct": bool(exact_match(text, sample.answers)), "scores": score,
        }
        for sample, text, score in zip(samples, written, scores, strict=True)
    ]  # fmt: skip
    return Result(tuple(rows), tuple(predictions))


def _choose(metrics: Mapping[str, Sequence[str | Metric]] | Sequence[str | Metric] | None, kind: str) -> dict[str, Scores]:
    """Give the metrics of one kind by name. `SparsightError` for a name that is none, before any model runs."""
    wanted: Sequence[str | Metric] = CAPTION if kind == "caption" else QUESTION
    if isinstance(metrics, Mapping):
        wanted = metrics.get(kind, wanted)
    elif metrics is not None:
        wanted = metrics
    chosen: dict[str, Scores] = {}
    for metric in wanted:
        if callable(metric):
            chosen[getattr(metric, "__name__", type(metric).__name__)] = _each(metric)
        elif metric in METRICS:
            chosen[metric] = METRICS[metric]
        else:
            raise SparsightError(f"unknown metric {metric!r}; allowed: {', '.join(METRICS)}, or a function")
    return chosen


def _rows(kinds: Sequence[str], scores: Sequence[Mapping[str, float]], seed: int) -> list[dict[str, Any]]:
    rows = []
    groups = list(dict.fromkeys(kinds))
    for group in (ALL, *(groups if len(groups) > 1 else ())):
        members = [score for kind, score in zip(kinds, scores, strict=True) if group in (ALL, kind)]
        for name in dict.fromkeys(name for score in members for name in score):
            values = [score[name] for score in members if name in score]
            interval = bootstrap(values, seed=seed)
            rows.append(_row(group or "other", name, sum(values) / len(values), interval, len(values)))
    return rows


def _row(kind: str, metric: str, value: float, interval: tuple[float, float] | None, n: int) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {"kind": kind, "metric": metric, "value": value, "low": low, "high": high, "n": n}
