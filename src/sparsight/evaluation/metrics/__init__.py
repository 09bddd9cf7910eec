"""Metrics: how well an answer fits the right ones. One file per metric, one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsight.evaluation.metrics.anls import anls
from sparsight.evaluation.metrics.cider import cider_d
from sparsight.evaluation.metrics.exact import exact_match
from sparsight.evaluation.metrics.vqa import vqa_accuracy

QUESTION, CAPTION = "question", "caption"  # samples of kind "caption", and all others


@dataclass(frozen=True)
class Metric:
    """`score(prediction, answers) -> value` of one sample, or with `corpus` `score(predictions, answers) -> [value]` of all.

    `title` stands on axes and cards. `percent`: values are shares from 0 to 1, told in percent. `default` names the sorts of
    samples that are scored by it where nobody names a metric: "question", "caption".
    """

    score: Callable
    title: str
    corpus: bool = False
    percent: bool = True
    default: tuple[str, ...] = ()

    def scores(self, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
        """The value of every sample."""
        if self.corpus:
            return self.score(predictions, answers)
        return [float(self.score(text, right)) for text, right in zip(predictions, answers, strict=True)]


METRICS: dict[str, Metric] = {
    "cider_d": Metric(cider_d, "CIDEr-D", corpus=True, percent=False, default=(CAPTION,)),
    "exact_match": Metric(exact_match, "exact match", default=(QUESTION, CAPTION)),
    "vqa_accuracy": Metric(vqa_accuracy, "VQA accuracy", default=(QUESTION,)),
    "anls": Metric(anls, "ANLS"),
}
TOKEN_METRICS: dict[str, Metric] = {  # of the right answers' tokens; measured in any case
    "token_accuracy": Metric(lambda: None, "token accuracy"),
    "perplexity": Metric(lambda: None, "perplexity", percent=False),
}


def title_of(metric: str) -> tuple[str, float]:
    """The title of a metric by name, and the factor that its values are told by: 100 for shares."""
    known = METRICS.get(metric) or TOKEN_METRICS.get(metric)
    return (known.title, 100.0 if known.percent else 1.0) if known else (metric.replace("_", " "), 1.0)


def axis_of(metric: str) -> tuple[str, float]:
    """The title of a metric with its unit, as it stands on an axis or over a column, and the same factor."""
    title, factor = title_of(metric)
    return (f"{title}, %" if factor == 100 else title), factor
