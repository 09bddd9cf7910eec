"""What a model's answers are worth: predictions, metrics, intervals."""

from sparsight.evaluate.answers import foresee
from sparsight.evaluate.bootstrap import bootstrap
from sparsight.evaluate.cider import cider_d
from sparsight.evaluate.evaluate import METRICS, Result, evaluate
from sparsight.evaluate.exact import exact_match
from sparsight.evaluate.generate import predict
from sparsight.evaluate.vqa import vqa_accuracy

__all__ = ["METRICS", "Result", "bootstrap", "cider_d", "evaluate", "exact_match", "foresee", "predict", "vqa_accuracy"]
