"""SparseGPT's factor: upper triangular U with U^T U = (G + damping * mean(diag G) I)^-1.

The published code (IST-DASLab/sparsegpt) takes a Cholesky factor of G, the explicit inverse, and a Cholesky factor of the
inverse, which rounding can leave indefinite. Ours is the same U by the flip identity: with J the reversal of rows and
columns and J G J = L L^T, U = J L^-1 J; one factor, one triangular inverse. G is scaled to a mean diagonal of one first,
so that inputs of any size fit float32.

Dead columns (never a non-zero input) get a diagonal of 1 before the mean is taken, as published; here in units of the
mean diagonal of the others, where the published 1 is in units of the inputs and can be far too large or small.
"""

from __future__ import annotations

import torch

WORST_DAMPING = 10.0
SMALL = 128  # rows below which a triangular matrix is inverted in one call


def inverse_factor(gram: torch.Tensor, damp: float = 0.01) -> tuple[torch.Tensor, float]:
    """Return U (in, in) float32 and the damping that was used.

    `gram` (in, in) is the sum of x x^T, symmetric; it does not change. If the damped matrix has no Cholesky factor, the
    damping is raised tenfold. Costs 2/3 of a product of two such matrices, and three copies of one.
    **Raises** `ValueError` on NaN and infinity, and if damping by 10 is not enough (then `gram` is no Gram matrix).
    """
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix holds NaN or infinity: the layer's inputs do, or overflow when squared")
    A = gram.float().flip(0, 1)  # (in, in), reversed; a copy
    diagonal = A.diagonal().clone()
    dead = diagonal == 0
    scale = max(float(diagonal.double().sum() / (~dead).sum().clamp(min=1)), torch.finfo(A.dtype).tiny)
    if bool(dead.all()):
        scale = 1.0
    A /= scale
    diagonal = torch.where(dead, 1.0, diagonal / scale)
    mean = float(diagonal.mean())
    tried = [damp]
    while True:
        A.diagonal().copy_(diagonal + tried[-1] * mean)
        L, failed = torch.linalg.cholesky_ex(A)
        if not failed:
            break
        tried.append(max(tried[-1] * 10, 0.01))
        if tried[-1] > 1.5 * WORST_DAMPING:
            raise ValueError(
                "the Gram matrix is not positive definite, damped by "
                f"{', '.join(f'{damping:g}' for damping in tried[:-1])} times its mean diagonal; it is not a sum of x x^T"
            )
    return _invert(L, A.zero_()).flip(0, 1).mul_(scale**-0.5), tried[-1]


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
