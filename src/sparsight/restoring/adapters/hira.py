"""HiRA under a mask, E = (W * (1 + s B A)) * M, Huang et al., ICLR 2025; PEFT's HiRA has s = 1."""

from __future__ import annotations

import torch

from sparsight import kernels
from sparsight.restoring.adapters import low_rank
from sparsight.restoring.adapters.adapter import Factors, masked, wide


def multiply(W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> torch.Tensor:
    """E = (W * (1 + s B A)) * M."""
    A, B = factors
    if (E := kernels.merge(W, A, B, scaling, packed, times=True)) is not None:
        return E
    kind = wide(W)
    E = torch.addmm(W.new_ones(1, 1, dtype=kind), B.to(kind), A.to(kind), alpha=scaling).mul_(W)
    return masked(E, packed).to(W.dtype)


def project(dE: torch.Tensor, W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> Factors:
    """The gradients of A and B; see `low_rank.project`."""
    return low_rank.project(dE, W, factors, scaling, packed, times=True)
