"""Random: every weight is as good as another. The floor that any method must beat."""

from __future__ import annotations

import torch

from sparsight.plan.pattern import Pattern
from sparsight.prune.moments import Moments


def random(W: torch.Tensor, moments: Moments | None, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    score = torch.rand(W.shape, generator=generator).to(W.device)  # (out, in)
    return W.masked_fill(~pattern.keep(score), 0)
