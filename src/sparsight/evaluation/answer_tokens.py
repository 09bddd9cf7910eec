"""How well a model predicts the right answers, token by token, each after the right tokens before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from sparsight.calibration.gradients import evaluating
from sparsight.data.encoding import Batch, select_answers


def answer_token_metrics(model: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Return `token_accuracy` (share of tokens that are the model's first choice), `perplexity` and `tokens` of the answers.

    End tokens count. Sums over all batches are divided once; logits are in float32. Cost: one forward per batch.
    """
    right, surprise, tokens = 0, 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            logits, labels = _answer_logits(model, batch.to(model.device))
            log_p = logits.float().log_softmax(-1)
            right += int((log_p.argmax(-1) == labels).sum())
            surprise -= float(log_p.gather(1, labels[:, None]).double().sum())
            tokens += len(labels)
    return {"token_accuracy": right / tokens, "perplexity": math.exp(min(surprise / tokens, 700)), "tokens": tokens}


def _answer_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (n, V) of the n answer tokens, and those tokens (n,)."""
    inputs = batch.inputs
    if batch.shifted:  # without labels the model computes no loss; an encoder-decoder needs them to feed its decoder
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
    return select_answers(model(**inputs).logits, batch.inputs["labels"], batch.shifted)
