"""Metrics: how well an answer fits the right ones. One file per metric, one line here."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsight.evaluation.metrics.anls import anls
from sparsight.evaluation.metrics.cider import cider_d
from sparsight.evaluation.metrics.exact import exact_match, plain_match
from sparsight.evaluation.metrics.relaxed import relaxed_accuracy
from sparsight.evaluation.metrics.vqa import vqa_accuracy

QUESTION, CAPTION = "question", "caption"  # samples of kind "caption", and all others


@dataclass(frozen=True)
class Metric:
    """`score(prediction, answers) -> value` of one sample, or with `corpus` `score(predictions, answers) -> [value]` of all.

    With `of_sample` it is `score(prediction, sample)`, for scores that look at the options.

    `title` stands on axes and cards. `percent`: values are shares from 0 to 1, told in percent. `default` names the sorts of
    samples that are scored by it where nobody names a metric: "question", "caption".
    """

    score: Callable
    title: str
    corpus: bool = False
    percent: bool = True
    default: tuple[str, ...] = ()
    of_sample: bool = False

    def scores(self, predictions: Sequence[str], samples: Sequence[Any]) -> list[float]:
        """The value of every sample."""
        if self.corpus:
            return self.score(predictions, [sample.answers for sample in samples])
        rights = samples if self.of_sample else [sample.answers for sample in samples]
        return [float(self.score(text, right)) for text, right in zip(predictions, rights, strict=True)]


METRICS: dict[str, Metric] = {
    "cider_d": Metric(cider_d, "CIDEr-D", corpus=True, percent=False, default=(CAPTION,)),
    "exact_match": Metric(exact_match, "exact match", default=(QUESTION, CAPTION)),
    "vqa_accuracy": Metric(vqa_accuracy, "VQA accuracy", default=(QUESTION,)),
    "anls": Metric(anls, "ANLS"),
    "relaxed_accuracy": Metric(relaxed_accuracy, "relaxed accuracy"),
    "plain_match": Metric(plain_match, "match without punctuation"),
}
TASK_METRICS: dict[str, Metric] = {  # of benchmarks that have scorers of their own, or scores of all samples together
    "accuracy": Metric(lambda: None, "accuracy"),
    "f1": Metric(lambda: None, "F1"),
    "precision": Metric(lambda: None, "precision"),
    "recall": Metric(lambda: None, "recall"),
    "yes_ratio": Metric(lambda: None, "share of yes"),
    "pair_accuracy": Metric(lambda: None, "both questions of a picture right"),
    "perception": Metric(lambda: None, "perception, of 2000", percent=False),
    "cognition": Metric(lambda: None, "cognition, of 800", percent=False),
}
TOKEN_METRICS: dict[str, Metric] = {  # of the right answers' tokens, which no answer has to be written for
    "token_accuracy": Metric(lambda: None, "token accuracy"),
    "perplexity": Metric(lambda: None, "perplexity", percent=False),
}
CHOICES = ChainMap(TOKEN_METRICS, METRICS)  # those that can be named, as they are now, METRICS first


def title_of(metric: str) -> tuple[str, float]:
    """The title of a metric by name, and the factor that its values are told by: 100 for shares."""
    known = METRICS.get(metric) or TASK_METRICS.get(metric) or TOKEN_METRICS.get(metric)
    return (known.title, 100.0 if known.percent else 1.0) if known else (metric.replace("_", " "), 1.0)


def axis_of(metric: str) -> tuple[str, float]:
    """The title of a metric with its unit, as it stands on an axis or over a column, and the same factor."""
    title, factor = title_of(metric)
    return (f"{title}, %" if factor == 100 else title), factor
