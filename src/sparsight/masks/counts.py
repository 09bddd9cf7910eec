"""What is counted of a whole matrix, in as few passes as torch allows.

`isfinite().all()`, `count_nonzero` of floats and sums of booleans take ten times as long on a CPU: they make copies, or are
not vectorized.
"""

from __future__ import annotations

import torch


def count_zeros(W: torch.Tensor) -> int:
    """The number of zeros, -0.0 among them."""
    return int((W == 0).count_nonzero())


def is_finite(W: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite: the extremes say it, and NaN is passed on to them."""
    if not W.numel():
        return True
    low, high = torch.aminmax(W.detach())
    return bool(low.isfinite() & high.isfinite())
