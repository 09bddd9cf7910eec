"""What a model's answers are worth: predictions, metrics, intervals."""

from sparsight.evaluation.answer_tokens import answer_token_metrics
from sparsight.evaluation.bootstrap import bootstrap
from sparsight.evaluation.evaluate import Result, evaluate
from sparsight.evaluation.generate import predict
from sparsight.evaluation.metrics import METRICS, Metric
from sparsight.evaluation.metrics.anls import anls
from sparsight.evaluation.metrics.cider import cider_d
from sparsight.evaluation.metrics.exact import exact_match
from sparsight.evaluation.metrics.vqa import vqa_accuracy

__all__ = [
    "METRICS", "Metric", "Result", "anls", "answer_token_metrics", "bootstrap", "cider_d", "evaluate", "exact_match",
    "predict", "vqa_accuracy",
]  # fmt: skip
