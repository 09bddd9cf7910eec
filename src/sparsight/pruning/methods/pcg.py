"""Update: the kept weights that come closest to the dense layer's outputs, for any mask.

Every row minimises (v - w) H (v - w)^T over the v that are zero where the mask is, H = G + 1 % of G's own diagonal, by
conjugate gradients with a diagonal preconditioner, all rows at once (the second half of ALPS, Meng et al.,
arXiv 2406.07831; code mazumder-lab/ALPS). The ridge pulls towards the dense weights, so that the solution is unique and
constant inputs change nothing. One product (out, in, in) per iteration.

Ours differs in the ridge: the published one is 1 % of the mean diagonal, which a few channels of massive activations own
(see `calibration/inverse_factor.py`).
"""

from __future__ import annotations

import torch

from sparsight.calibration.moments import Moments

RIDGE = 0.01
TOLERANCE = 1e-4
ITERATIONS = 100


def pcg(
    W: torch.Tensor, keep: torch.Tensor, moments: Moments, *, tolerance: float = TOLERANCE, iterations: int = ITERATIONS
) -> torch.Tensor:
    """Return argmin_V (V - W) H (V - W)^T per row, a new tensor (out, in) that is zero where `keep` is False.

    Stops once every row's residual is below `tolerance` times its first one. Cost: out * in^2 per iteration.
    """
    H = ridged(moments.gram)
    return solve(H, W.float(), keep, torch.where(keep, W.float(), 0), tolerance, iterations).to(W.dtype)


def ridged(gram: torch.Tensor) -> torch.Tensor:
    """Return G + 0.01 diag(G) (in, in), divided by the mean of the diagonal; the ridge of a dead column is that of the mean.

    The identity for inputs that are all zero.
    """
    mean = gram.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    H = gram / mean
    diagonal = H.diagonal()
    diagonal.add_(RIDGE * torch.where(diagonal > 0, diagonal, 1))
    return H


def solve(
    H: torch.Tensor, W: torch.Tensor, keep: torch.Tensor, start: torch.Tensor, tolerance: float, iterations: int
) -> torch.Tensor:
    """Minimise (V - W) H (V - W)^T row by row over V (out, in) that is zero outside `keep`, from `start`; return V."""
    V, scale = start, keep / H.diagonal()  # the preconditioner, zero outside the mask
    residual = ((W - V) @ H).masked_fill_(~keep, 0)
    z = residual * scale
    direction, power = z.clone(), (residual * z).sum(1, keepdim=True)  # (out, 1)
    goal = tolerance**2 * power
    for _ in range(iterations):
        if bool((power <= goal).all()):
            break
        moved = (direction @ H).masked_fill_(~keep, 0)
        curvature = (direction * moved).sum(1, keepdim=True)
        step = torch.where(curvature > 0, power / curvature, 0)
        V = V + step * direction
        residual = residual - step * moved
        z = residual * scale
        before, power = power, (residual * z).sum(1, keepdim=True)
        direction = z + torch.where(before > 0, power / before, 0) * direction
    return V
