"""SparseGPT's factor: upper triangular U with U^T U = (G + damping * max(m, diag G / 10))^-1, m its usual diagonal.

The published code (IST-DASLab/sparsegpt) takes a Cholesky factor of G, the explicit inverse, and a Cholesky factor of the
inverse, which rounding can leave indefinite. Ours is the same U by the flip identity: with J the reversal of rows and
columns and J G J = L L^T, U = J L^-1 J; one factor, one triangular inverse. G is scaled to a diagonal of one first, so that
inputs of any size fit float32.

Ours differs in the damping. The published one is 1 % of the mean diagonal, which a channel of massive activations owns:
with a mean of 600 medians the update is worse than none. Ours is 1 % of a mean m for which no column counts more than ten
medians, and of a tenth of a column's own diagonal where that is more. On layers without such channels it is the published
damping; each column's own diagonal alone, which suits ALPS and PCG, is worse for SparseGPT (`docs/LOG.md`).

Dead columns (never a non-zero input) have the mean diagonal of the others, where the published 1 is in units of the inputs
and can be far too large or small.
"""

from __future__ import annotations

import torch

from sparsight.masks.matrix import is_finite

WORST_DAMPING = 10.0
OUTLIER = 10.0  # medians: what a column counts at most in the mean diagonal
SMALL = 128  # rows below which a triangular matrix is inverted in one call


def inverse_factor(gram: torch.Tensor, damp: float = 0.01) -> tuple[torch.Tensor, float]:
    """Return U (in, in) float32 and the damping that was used.

    `gram` (in, in) is the sum of x x^T, symmetric; it does not change. If the damped matrix has no Cholesky factor, the
    damping is raised tenfold. Costs 2/3 of a product of two such matrices, and three copies of one.
    **Raises** `ValueError` on NaN and infinity, and if damping by 10 is not enough (then `gram` is no Gram matrix).
    """
    if not is_finite(gram):
        raise ValueError("the Gram matrix holds NaN or infinity: the layer's inputs do, or overflow when squared")
    A = gram.float().flip(0, 1)  # (in, in), reversed; a copy
    size = column_sizes(gram).flip(0)
    A /= size
    A /= size.unsqueeze(1)
    diagonal = A.diagonal().clone()
    diagonal[diagonal == 0] = 1
    negative = bool((diagonal < 0).any())
    share = (usual_size(gram) / size).square().clamp(min=1 / OUTLIER)  # of a column's own diagonal
    tried = [damp]
    while True:
        A.diagonal().copy_(diagonal + tried[-1] * share)
        L, failed = torch.linalg.cholesky_ex(A)
        if not failed and not negative:
            break
        tried.append(max(tried[-1] * 10, 0.01))
        if tried[-1] > 1.5 * WORST_DAMPING:
            raise ValueError(
                "the Gram matrix is not positive definite, damped by "
                f"{', '.join(f'{damping:g}' for damping in tried[:-1])} times its mean diagonal; it is not a sum of x x^T"
            )
    return _invert(L, A.zero_()).flip(0, 1).div_(size.flip(0)), tried[-1]


def usual_size(gram: torch.Tensor) -> torch.Tensor:
    """Return the root of the mean of a Gram matrix's diagonal, columns above ten medians counted as ten; 0 for no inputs."""
    diagonal = gram.diagonal().double()
    live = diagonal[diagonal > 0]
    return live.clamp(max=OUTLIER * live.median()).mean().sqrt().float() if len(live) else torch.zeros_like(gram[0, 0])


def column_sizes(gram: torch.Tensor) -> torch.Tensor:
    """Return the roots of a Gram matrix's diagonal (in,); a dead column has that of the mean of the others, or 1."""
    diagonal = gram.diagonal().double()
    mean = diagonal.sum() / (diagonal > 0).sum().clamp(min=1)
    size = torch.where(diagonal > 0, diagonal, mean if bool(mean > 0) else torch.ones_like(mean)).sqrt()
    return size.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)


def _invert(L: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the inverse of the lower triangular L (n, n) into `out`, which is zero, by halves; return `out`."""
    n = L.shape[0]
    if n <= SMALL:
        unit = torch.eye(n, dtype=L.dtype, device=L.device)
        return out.copy_(torch.linalg.solve_triangular(L, unit, upper=False))
    half = n // 2
    top, bottom = _invert(L[:half, :half], out[:half, :half]), _invert(L[half:, half:], out[half:, half:])
    out[half:, :half] = (bottom @ (L[half:, :half] @ top)).neg_()
    return out
