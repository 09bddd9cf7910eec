"""Scores from the calibration loss, on the dense model, from the gradient of every sample.

`snip`: S = |W g| with the mean gradient g, the change of the loss to first order without the weight (Lee et al.,
arXiv 1810.02340). `fisher`: S = W^2 E[g^2] with the mean over samples of the squared gradient, the diagonal of the
empirical Fisher matrix in the second-order term of Optimal Brain Damage (LeCun et al., 1989).

Where the loss does not depend on a layer at all (an expert that no answer uses), both use Wanda's score.

The published VLM fork's first order multiplies W^2 by |g|, which is neither.
"""

from __future__ import annotations

import torch

from sparsight.calibration.moments import Moments
from sparsight.masks.matrix import keep_only
from sparsight.masks.pattern import Pattern
from sparsight.pruning.methods.wanda import wanda_score


def snip(W: torch.Tensor, moments: Moments, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    """Return a copy of W (out, in) with zeros at the smallest |W_ij mean(g_ij)|, g = dL/dW in `moments.sensitivity`."""
    score = (W.float() * moments.sensitivity.mean).abs()  # (out, in)
    score = score if bool(score.any()) else wanda_score(W, moments)
    return keep_only(W, pattern.keep(score))


def fisher(W: torch.Tensor, moments: Moments, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    """Return a copy of W (out, in) with zeros at the smallest W_ij^2 mean(g_ij^2), g = dL/dW in `moments.sensitivity`."""
    score = W.float().square() * moments.sensitivity.square  # (out, in)
    score = score if bool(score.any()) else wanda_score(W, moments)
    return keep_only(W, pattern.keep(score))
