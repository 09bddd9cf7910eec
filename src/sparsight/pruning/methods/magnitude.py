"""Magnitude: prune the smallest |W| (Han et al., arXiv 1506.02626). The paper's published code ranks W itself, without the
absolute value, and so removes all negative weights first; ours does not.
"""

from __future__ import annotations

import torch

from sparsight.calibration.moments import Moments
from sparsight.masks.matrix import keep_only
from sparsight.masks.pattern import Pattern


def magnitude(W: torch.Tensor, moments: Moments | None, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    """Return a copy of W (out, in) with zeros at the smallest |W_ij|; `moments` and `generator` are not used."""
    return keep_only(W, pattern.keep(W.abs()))
