"""Weights that give the dense model's outputs on the inputs of the pruned one: what a solver aims at in place of W.

With inputs X of a layer in the model as it is pruned so far, and Z in the dense model, W' is the solution of

    argmin_V ||V X - W Z||^2 + (V - W) R (V - W)^T  =  W + W (Z - X) X^T (X X^T + R)^-1,

R = 1 % of the diagonal of X X^T, as in `methods/pcg.py`. A solver that takes W' for W makes up for the errors of the blocks
before (asymmetric calibration: GPTAQ, Li et al., arXiv 2504.02692, which adds the same term to the steps of GPTQ). Where
nothing before was pruned, W' is W.
"""

from __future__ import annotations

import torch

from sparsight.calibration.moments import Moments
from sparsight.pruning.methods.pcg import ridged


def dense_target(W: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Return W' (out, in), a new tensor; W where the dense model's inputs are the same, or were not looked at.

    Cost: in^3 / 3 + 3 out * in^2.
    """
    if moments.drift is None or not bool(moments.drift.any()):
        return W.clone()
    G = moments.gram
    H = ridged(G)  # (in, in), in units of the mean diagonal
    size = H.diagonal().sqrt()
    factor = torch.linalg.cholesky(H / size / size.unsqueeze(1))
    moved = W.float() @ moments.drift / G.diagonal().mean()  # (out, in)
    return (W.float() + torch.cholesky_solve((moved / size).T, factor).T / size).to(W.dtype)
