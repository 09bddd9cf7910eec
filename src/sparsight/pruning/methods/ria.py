"""RIA, relative importance and activations: S_ij = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||x_j||^(1/2)
(Zhang et al., "Plug-and-Play", ICLR 2024; code biomedical-cybernetics/Relative-importance-and-activation-pruning).

Its channel permutation for n:m is `pruning/permute.py`, which works with every method. Ours differs in the exact count
where scores tie, in padding, and in a row or column of zeros, which scores 0 and not NaN.
"""

from __future__ import annotations

import torch

from sparsight.calibration.moments import Moments
from sparsight.masks.matrix import keep_only
from sparsight.masks.pattern import Pattern

POWER = 0.5


def ria_score(W: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Return S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||x_j||_2^(1/2), float32 (out, in)."""
    size = W.abs().float()  # (out, in)
    tiny = torch.finfo(torch.float32).tiny
    relative = size / size.sum(0, keepdim=True).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
    return relative * moments.norm**POWER


def ria(W: torch.Tensor, moments: Moments, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    """Return a copy of W (out, in) with zeros at the smallest `ria_score`; the kept weights do not change."""
    return keep_only(W, pattern.keep(ria_score(W, moments)))
