"""Wanda: S_ij = |W_ij| * ||x_j||_2 (Sun et al., arXiv 2306.11695; code locuslab/wanda).

Ours differs in three places: the count is exact where scores tie, padding is not in the norms, and the score is
float32 whatever the weights are.
"""

from __future__ import annotations

import torch

from sparsight.plan.pattern import Pattern
from sparsight.prune.moments import Moments


def wanda_score(W: torch.Tensor, moments: Moments) -> torch.Tensor:
    return W.abs().float() * moments.norm  # (out, in) * (in,)


def wanda(W: torch.Tensor, moments: Moments, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    return W.masked_fill(~pattern.keep(wanda_score(W, moments)), 0)
