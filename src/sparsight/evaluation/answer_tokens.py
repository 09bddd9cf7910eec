"""How well a model predicts the right answers, token by token, each after the right tokens before it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sparsight.calibration.gradients import evaluating
from sparsight.calibration.lockstep import lockstep
from sparsight.calibration.park import Park
from sparsight.data.encoding import Batch, select_answers
from sparsight.model.skeleton import device_of


def answer_token_metrics(
    model: Any,
    batches: Iterable[Batch],
    *,
    blocks: Sequence[tuple[str, nn.Module]] | None = None,
    park: Park | None = None,
) -> dict[str, float]:
    """Return `token_accuracy` (share of tokens that are the model's first choice), `perplexity` and `tokens` of the answers.

    End tokens count. Sums over all batches are divided once; logits are in float32. Cost: one forward per batch. With
    `blocks` all batches go through one block before the next, so that each is needed once; `park` takes what they hold.
    """
    sums: dict[int, tuple[int, float, int]] = {}  # by batch: right tokens, surprise, tokens

    def judge(place: int, batch: Batch, output: Any) -> None:
        logits, labels = select_answers(output.logits, batch.inputs["labels"], batch.shifted)
        log_p = logits.float().log_softmax(-1)
        surprise = -float(log_p.gather(1, labels[:, None]).double().sum())
        sums[place] = int((log_p.argmax(-1) == labels).sum()), surprise, len(labels)

    with evaluating(model), torch.no_grad():
        if blocks is None:
            for place, batch in enumerate(batches):
                moved = batch.to(device_of(model))
                judge(place, moved, model(**_inputs(moved)))
        else:
            ready = [*batches]
            lockstep(
                model, blocks, [_inputs(batch) for batch in ready], lambda *_: None,
                on_output=lambda place, output: judge(place, ready[place], output), park=park,
            )  # fmt: skip
    right, surprise, tokens = map(sum, zip(*(sums[place] for place in sorted(sums)), strict=True))
    return {"token_accuracy": right / tokens, "perplexity": math.exp(min(surprise / tokens, 700)), "tokens": tokens}


def _inputs(batch: Batch) -> dict[str, Any]:
    """What the model gets: without labels it computes no loss; an encoder-decoder needs them to feed its decoder."""
    return {key: value for key, value in batch.inputs.items() if key != "labels" or not batch.shifted}
