"""How well a model foresees the right answers, token by token, each after the right ones before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from sparsight.data.encoding import Batch, answers_of


def foresee(model: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Measure the answers' tokens: the share that is the model's first choice, the perplexity, and their number.

    End tokens count. Everything is summed over the batches before it is divided; logits are taken in float32.
    """
    right, surprise, tokens = 0, 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                moved = batch.to(model.device)
                logits, labels = _answer_logits(model, moved)
                log_p = logits.float().log_softmax(-1)
                right += int((log_p.argmax(-1) == labels).sum())
                surprise -= float(log_p.gather(1, labels[:, None]).double().sum())
                tokens += len(labels)
    finally:
        model.train(was_training)
    return {"token_accuracy": right / tokens, "perplexity": math.exp(min(surprise / tokens, 700)), "tokens": tokens}


def _answer_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the logits (n, vocabulary) of the n answer tokens, and those tokens (n,)."""
    inputs = batch.inputs
    if batch.shifted:  # without labels the model computes no loss; an encoder-decoder needs them to feed its decoder
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
    return answers_of(model(**inputs).logits, batch.inputs["labels"], batch.shifted)
