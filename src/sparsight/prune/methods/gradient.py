"""Scores from the calibration loss, on the dense model, over all batches.

`snip`: S = |W g| with the mean gradient g, to first order what the loss loses with the weight (Lee et al.,
arXiv 1810.02340). `fisher`: S = W^2 E[g^2] with the mean over batches of the squared gradient, the diagonal of the
empirical Fisher matrix in the second-order term of Optimal Brain Damage (LeCun et al., 1989).

Where the loss does not depend on a layer at all (an expert that serves no answer), both score as Wanda does.

The published VLM fork's first order multiplies W^2 by |g|, which is neither.
"""

from __future__ import annotations

import torch

from sparsight.plan.pattern import Pattern
from sparsight.prune.methods.wanda import wanda_score
from sparsight.prune.moments import Moments


def snip(W: torch.Tensor, moments: Moments, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    score = (W.float() * moments.sensitivity.mean).abs()  # (out, in)
    score = score if bool(score.any()) else wanda_score(W, moments)
    return W.masked_fill(~pattern.keep(score), 0)


def fisher(W: torch.Tensor, moments: Moments, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    score = W.float().square() * moments.sensitivity.square  # (out, in)
    score = score if bool(score.any()) else wanda_score(W, moments)
    return W.masked_fill(~pattern.keep(score), 0)
