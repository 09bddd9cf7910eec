"""SparseLoRA, E = (W + s B A) * M with A (r, in) and B (out, r), He et al., arXiv 2404.02424.

sparselora-fast is the same with the two-product gradient of LoRS, which leaves the mask out of backward: cheaper, biased.
"""

from __future__ import annotations

import math

import torch

from sparsight import kernels
from sparsight.restoring.adapters.adapter import Factors, masked, wide


def start(W: torch.Tensor, packed: torch.Tensor | None, rank: int) -> Factors:
    """A kaiming-uniform and B zero, as in LoRA: training starts from the sparse model itself."""
    A = torch.empty(rank, W.shape[1])
    torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, torch.zeros(W.shape[0], rank)


def shapes(out: int, columns: int, rank: int, density: float) -> tuple[tuple[int, ...], ...]:
    """The shapes of A and B."""
    return (rank, columns), (out, rank)


def add(W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> torch.Tensor:
    """E = (W + s B A) * M."""
    A, B = factors
    if (E := kernels.merge(W, A, B, scaling, packed)) is not None:
        return E
    kind = wide(W)
    return masked(torch.addmm(W.to(kind), B.to(kind), A.to(kind), alpha=scaling), packed).to(W.dtype)


def project(
    dE: torch.Tensor, W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None, times: bool = False
) -> Factors:
    """dA = s B^T (dE * M) and dB = s (dE * M) A^T; with `times` the gradient is multiplied by W first, as HiRA needs it."""
    A, B = factors
    gradients = kernels.project(dE, A, B, scaling, packed, W=W if times else None)
    if gradients is None:
        kind = torch.promote_types(A.dtype, wide(W))
        kept = masked(dE.to(kind, copy=True), packed)
        kept = kept.mul_(W).mul_(scaling) if times else kept.mul_(scaling)
        gradients = B.T.to(kind) @ kept, kept @ A.T.to(kind)
    return gradients[0].to(A.dtype), gradients[1].to(B.dtype)


def two_products(g: torch.Tensor, x: torch.Tensor, factors: Factors, scaling: float) -> Factors:
    """The gradients of plain LoRA, from g (tokens, out) and x (tokens, in)."""
    A, B = factors
    dA = (g @ B.to(g.dtype)).T @ x  # (r, in)
    dB = g.T @ (x @ A.T.to(x.dtype))  # (out, r)
    return dA.to(A.dtype) * scaling, dB.to(B.dtype) * scaling
