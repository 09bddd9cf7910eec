"""Random: zeros at random places. Any other method must be better than this."""

from __future__ import annotations

import torch

from sparsight.calibration.moments import Moments
from sparsight.masks.matrix import keep_only
from sparsight.masks.pattern import Pattern


def random(W: torch.Tensor, moments: Moments | None, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    """Return a copy of W (out, in) with zeros at random places, the same on any device; `moments` are not used."""
    score = torch.rand(W.shape, generator=generator).to(W.device)  # (out, in)
    return keep_only(W, pattern.keep(score))
