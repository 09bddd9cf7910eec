"""ALPS: the support by ADMM, then the kept weights by conjugate gradients (Meng et al., arXiv 2406.07831; code
mazumder-lab/ALPS).

On inputs scaled to unit norm, with H = Q diag(l) Q^T, the splitting B = D with D in the pattern repeats

    B <- (H + rho)^-1 (W H - V + rho D),   D <- the pattern's best part of B + V / rho,   V <- V + rho (B - D),

and rho grows with the changes of the support: every three iterations it is multiplied by 1.3, 1.2 or 1.1, or divided by 5
as long as nothing has changed yet. Ends after 300 iterations, or when the support changes no more. The kept weights are
then the solution of 10 iterations of conjugate gradients (`methods/pcg.py`).

Ours differs in two places. Zeros may be counted per row as well as in the whole matrix, which is what the code does. And
the ridge of H is 1 % of each column's own diagonal, not of their mean (see `methods/pcg.py`).
"""

from __future__ import annotations

import torch

from sparsight.calibration.moments import Moments
from sparsight.masks.pattern import Pattern
from sparsight.pruning.methods.pcg import ridged, solve

RHO, EVERY, ITERATIONS, SETTLED_AFTER, SETTLED = 0.1, 3, 300, 30, 3e-4
SOLVE = 10


def alps(W: torch.Tensor, moments: Moments, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    """Return W (out, in) pruned and updated, a new tensor: argmin_V ||(W - V) X||^2, V within `pattern`; needs the Gram.

    Cost: one eigendecomposition (in, in), and at most 300 products (out, in, in) and 100 of (in, in, in).
    """
    H = ridged(moments.gram)  # (in, in)
    size = H.diagonal().sqrt()
    H = H / size / size.unsqueeze(1)
    scaled = W.float() * size  # (out, in): W X = (W size)(X / size)
    B = _admm(H, scaled, pattern)
    support = pattern.keep(B.square())
    solution = solve(H, scaled, support, torch.where(support, B, 0), 1e-4, SOLVE)
    return (solution / size).to(W.dtype).contiguous()


def _admm(H: torch.Tensor, W: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(H.double())
    target = W @ H

    def inverse(rho: float) -> torch.Tensor:
        return ((vectors / (values + rho)) @ vectors.T).float()

    def part(B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keep = pattern.keep(B.square())
        return torch.where(keep, B, 0), keep

    rho, moved = RHO, False
    start, before = part(W)
    D, V, solver = start, torch.zeros_like(W), inverse(rho)
    kept = max(1, int(before.sum()))
    B = W
    for step in range(1, ITERATIONS + 1):
        B = (target - V + rho * D) @ solver
        D, keep = part(B + V / rho)
        V = V + rho * (B - D)
        if step % EVERY:
            continue
        changed = int((keep != before).sum())
        before = keep
        if changed == 0 and moved:
            break
        if changed > 0.1 * kept or changed > 0.005 * kept:
            rho, moved = rho * (1.3 if changed > 0.1 * kept else 1.2), True
        elif changed and moved:
            rho *= 1.1
        else:
            rho /= 5
            if changed:
                D, V = start, torch.zeros_like(W)
        rho = min(rho, 1e6)
        solver = inverse(rho)
        if step > SETTLED_AFTER and changed < SETTLED * kept:
            break
        if rho < 1e-12:
            break
    return B
