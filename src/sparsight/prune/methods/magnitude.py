"""Magnitude: the smallest |W| go (Han et al., arXiv 1506.02626). The paper's published code ranks W itself, without the
absolute value, and so removes all negative weights first; ours does not."""

from __future__ import annotations

import torch

from sparsight.plan.pattern import Pattern
from sparsight.prune.moments import Moments


def magnitude(W: torch.Tensor, moments: Moments | None, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    return W.masked_fill(~pattern.keep(W.abs()), 0)
