"""From a model and samples to a table of metrics with intervals, and every prediction."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsight.checks import check_name, check_signature, name_of
from sparsight.data.batching import batches
from sparsight.data.encoding import Batch, Encoder
from sparsight.data.sample import Sample
from sparsight.errors import SparsightError
from sparsight.evaluation.answer_tokens import answer_token_metrics
from sparsight.evaluation.bootstrap import bootstrap, bootstrap_sums
from sparsight.evaluation.generate import predict
from sparsight.evaluation.metrics import CAPTION, CHOICES, METRICS, QUESTION, TASK_METRICS, TOKEN_METRICS, Metric
from sparsight.evaluation.metrics.exact import exact_match
from sparsight.model.load import overflow_advice
from sparsight.progress import Progress
from sparsight.tasks import Task, Whole

ALL = "all"
COLUMNS = ("kind", "metric", "value", "low", "high", "n")


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    `rows` has one {kind, metric, value, low, high, n} per metric, first over "all" samples that the metric is for, then
    per kind where there are several; low and high are a 95 % bootstrap interval over samples, None for the measures of
    tokens. `predictions` has one {id, kind, prompt, prediction, answers, correct, scores} per sample, in order.
    `skipped` counts the broken samples that were left out; `data` says what was read of the others, where that is not all.
    """

    rows: tuple[dict[str, Any], ...]
    predictions: tuple[dict[str, Any], ...]
    skipped: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)

    def value(self, metric: str, kind: str = ALL) -> float:
        """Look one value up. **Raises** `SparsightError` if there is none."""
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
        facts = {"metrics": list(self.rows), "skipped": self.skipped, **({"data": dict(self.data)} if self.data else {})}
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
    metrics: Mapping[str, Sequence[str | Callable]] | Sequence[str | Callable] | None = None,
    batch_size: int = 32,
    beams: int = 1,
    max_new_tokens: int = 32,
    length_penalty: float = 1.0,
    seed: int = 0,
    task: Task | None = None,
    progress: Progress | None = None,
) -> Result:
    """Ask the model every sample's last question and score what it writes.

    `metrics` are names in `CHOICES` or functions (prediction, answers) -> score, for all samples, or by kind. By default
    samples of kind "caption" get CIDEr-D and exact match, all others exact match and VQA accuracy, and the right answers
    are measured token by token, too. Where only tokens are measured nothing is asked. `seed` is the bootstrap's. The
    samples of a `task` are scored as it says.

    **Raises** `SparsightError` for an unknown metric, for no samples, and for a value that is NaN or infinite.
    """
    metrics, of_tokens = split_metrics(metrics)
    by_kind = metrics_of(samples, metrics, task)
    samples = [sample.in_words_of(model.config.model_type) for sample in samples]
    ready = batches(samples, Encoder(processor, model), batch_size)
    if metrics == ():
        return Result(tuple(token_rows(model, ready, of_tokens)), ())
    texts = predict(
        model, processor, samples, batch_size=batch_size, beams=beams, max_new_tokens=max_new_tokens,
        length_penalty=length_penalty, progress=progress,
    )  # fmt: skip
    result = score(samples, texts, by_kind, seed=seed, task=task)
    if not of_tokens:
        return result
    return replace(result, rows=(*result.rows, *token_rows(model, ready, of_tokens)))


def metrics_of(
    samples: Sequence[Sample],
    metrics: Mapping[str, Sequence[str | Callable]] | Sequence[str | Callable] | None = None,
    task: Task | None = None,
) -> dict[str, dict[str, Metric]]:
    """The metrics by name that samples are scored by, by kind, or those of a task for all of them together.

    **Raises** `SparsightError` for an unknown metric, and for no samples.
    """
    if not samples:
        raise SparsightError("nothing to evaluate: no samples")
    kinds = list(dict.fromkeys(sample.kind for sample in samples))
    if ALL in kinds:
        raise SparsightError(f"no sample can be of kind {ALL!r}: that row is of all samples together")
    return {kind: find_metrics(metrics, kind) for kind in kinds} if task is None else task_metrics(task)


def score(
    samples: Sequence[Sample],
    texts: Sequence[str],
    by_kind: Mapping[str, Mapping[str, Metric]],
    *,
    seed: int = 0,
    task: Task | None = None,
) -> Result:
    """Score the answers that somebody wrote to the last questions of samples; `by_kind` is that of `metrics_of`."""
    scores: list[dict[str, float]] = [{} for _ in samples]
    for kind, chosen in by_kind.items():
        members = [i for i, sample in enumerate(samples) if kind in (ALL, sample.kind)]
        for name, metric in chosen.items():
            values = metric.scores([texts[i] for i in members], [samples[i] for i in members])
            for i, value in zip(members, values, strict=True):
                scores[i][name] = value
    rows = score_rows([sample.kind for sample in samples], scores, seed)
    if task is not None and task.whole is not None:
        rows += _whole_rows(task.whole, samples, texts, seed)
    predictions = [
        {
            "id": sample.id, "kind": sample.kind, "prompt": sample.prompt, "prediction": text,
            "answers": list(sample.answers), "correct": _is_right(text, sample, own, task), "scores": own,
        }
        for sample, text, own in zip(samples, texts, scores, strict=True)
    ]  # fmt: skip
    return Result(tuple(rows), tuple(predictions))


def task_metrics(task: Task) -> dict[str, dict[str, Metric]]:
    """The metrics of a benchmark by name, for all of its samples together."""
    own = {"accuracy": replace(TASK_METRICS["accuracy"], score=task.score, of_sample=True)} if task.score else {}
    return {ALL: {**{name: METRICS[name] for name in task.metrics}, **own}}


def _is_right(text: str, sample: Sample, scores: Mapping[str, float], task: Task | None) -> bool:
    """Whether an answer counts as right in the gallery: an exact match, or half of a benchmark's score."""
    name = next(iter(scores), "")
    if task is None or not (METRICS.get(name) or TASK_METRICS[name]).percent:
        return bool(exact_match(text, sample.answers))
    return scores[name] >= 0.5


def _whole_rows(whole: Whole, samples: Sequence[Sample], texts: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Rows of the scores that are of all samples together, and of each kind where there are several."""
    kinds = list(dict.fromkeys(sample.kind for sample in samples))
    rows = []
    for group in (ALL, *(kinds if len(kinds) > 1 else ())):
        members = [
            {"id": sample.id, "kind": sample.kind, "prediction": text, "answers": sample.answers}
            for sample, text in zip(samples, texts, strict=True)
            if group in (ALL, sample.kind)
        ]
        for name, (value, low, high) in bootstrap_sums(whole.parts(members), whole.values, seed=seed).items():
            rows.append(_row(group or "other", name, value, (low, high), len(members)))
    return rows


def token_rows(
    model: Any, batches: Iterable[Batch], names: Sequence[str] = (*TOKEN_METRICS,), **walk: Any
) -> list[dict[str, Any]]:
    """Rows of a result for the tokens of the right answers; `walk` are further arguments of `answer_token_metrics`."""
    values = answer_token_metrics(model, batches, **walk)
    advice = overflow_advice(model, "the weights may be damaged: look at them, and try `dtype=float32`")
    return [_row(ALL, name, values[name], None, int(values["tokens"]), advice) for name in names]


def split_metrics(metrics: Any) -> tuple[Any, tuple[str, ...]]:
    """Divide metrics into those of answers, which are () for none and None for the default, and the names of tokens'."""
    if not metrics:
        return None, tuple(TOKEN_METRICS)
    if isinstance(metrics, Mapping):  # by kind, and those of tokens are of all samples
        return metrics, ()
    named = tuple(name for name in TOKEN_METRICS if name in metrics)
    return tuple(metric for metric in metrics if metric not in named), named


def find_metrics(
    metrics: Mapping[str, Sequence[str | Callable]] | Sequence[str | Callable] | None, kind: str
) -> dict[str, Metric]:
    """The metrics of one kind of samples by name; those of the table that are its default where none are named.

    **Raises** `SparsightError` for a name that is none.
    """
    sort = CAPTION if kind == CAPTION else QUESTION
    names: Sequence[str | Callable] = [name for name, metric in METRICS.items() if sort in metric.default]
    if isinstance(metrics, Mapping):
        names = metrics.get(kind, names)
    elif metrics is not None:
        names = metrics
    chosen: dict[str, Metric] = {}
    for metric in names:
        if callable(metric):
            check_signature("metrics", metric, "(prediction, answers)")
            name = name_of(metric)
            chosen[name] = Metric(metric, name, percent=False)
        else:
            check_name("metrics", metric, tuple(CHOICES))
            chosen[metric] = METRICS[metric]
    return chosen


def headline(rows: Sequence[Mapping[str, Any]], metric: str | None = None) -> Mapping[str, Any]:
    """The row over all samples that stands for a result: of `metric`, else of exact match, else of the first metric."""
    over_all = {row["metric"]: row for row in rows if row["kind"] == ALL}
    return over_all[metric] if metric else over_all.get("exact_match") or next(iter(over_all.values()))


def score_rows(kinds: Sequence[str], scores: Sequence[Mapping[str, float]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a result: the mean of every score with its interval, over all samples and per kind where there are several."""
    rows = []
    groups = list(dict.fromkeys(kinds))
    for group in (ALL, *(groups if len(groups) > 1 else ())):
        members = [score for kind, score in zip(kinds, scores, strict=True) if group in (ALL, kind)]
        for name in dict.fromkeys(name for score in members for name in score):
            values = [score[name] for score in members if name in score]
            interval = bootstrap(values, seed=seed)
            rows.append(_row(group or "other", name, sum(values) / len(values), interval, len(values)))
    return rows


def _row(
    kind: str, metric: str, value: float, interval: tuple[float, float] | None, n: int, advice: str = "mend the metric"
) -> dict[str, Any]:  # fmt: skip
    if not math.isfinite(value):
        raise SparsightError(f"{metric}: is {value}; {advice}")
    low, high = interval or (None, None)
    return {"kind": kind, "metric": metric, "value": value, "low": low, "high": high, "n": n}
