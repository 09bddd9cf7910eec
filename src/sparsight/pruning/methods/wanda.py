"""Wanda: S_ij = |W_ij| * ||x_j||_2 (Sun et al., arXiv 2306.11695; code locuslab/wanda).

Ours differs in three places: the count is exact where scores tie, padding is not in the norms, and the score is
float32 whatever the weights are.
"""

from __future__ import annotations

import torch

from sparsight.calibration.moments import Moments
from sparsight.masks.matrix import keep_only
from sparsight.masks.pattern import Pattern


def wanda_score(W: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Return S_ij = |W_ij| ||x_j||_2, float32 (out, in)."""
    return W.abs().float().mul_(moments.norm)  # (out, in) * (in,)


def wanda(W: torch.Tensor, moments: Moments, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    """Return a copy of W (out, in) with zeros at the smallest |W_ij| ||x_j||_2; the kept weights do not change."""
    return keep_only(W, pattern.keep(wanda_score(W, moments)))
