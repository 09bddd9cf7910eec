"""AlphaPruning: blocks with a heavy-tailed spectrum are well trained and keep more (Lu et al., arXiv 2410.10912; code
haiquanlu/AlphaPruning).

alpha = 1 + n / sum_i ln(lambda_i / lambda_min), the Hill estimate of the power law that the largest half of the
eigenvalues of W^T W follow; averaged over the layers of a block. Sparsities are in proportion to a line from 1 - tau at
the component's lowest alpha to 1 + tau at its highest, tau = 0.3, scaled to the component's budget. Needs no data.

As published but for eigenvalues that are zero (a pruned or dead row), which there make alpha NaN and here are left out,
and equal alphas, which there divide by zero and here spread the budget evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sparsight.model.anatomy import Layer
from sparsight.plan.policy import by, stretched

TAU = 0.3
HIGHEST = 100.0  # equal eigenvalues have no tail at all, and an infinite alpha


def alpha(layers: Sequence[Layer], budget: Mapping[str, float], measure: object = None) -> dict[str, float]:
    heavy: dict[str, float] = {}
    for block in by(layers, "block").values():
        mean = sum(hill(layer.weight) for layer in block) / len(block)
        heavy |= {layer.name: mean for layer in block}
    return {name: 1 / (1 - TAU + 2 * TAU * place) for name, place in stretched(heavy, layers).items()}


def hill(W: torch.Tensor) -> float:  # (out, in)
    """The exponent of the tail of W's spectrum; low where it is heavy. Costs one SVD."""
    eigenvalues = torch.linalg.svdvals(W.float()).square().double().flip(0)  # ascending
    eigenvalues = eigenvalues[eigenvalues > 1e-12 * eigenvalues[-1]]
    tail = eigenvalues[len(eigenvalues) // 2 :]
    if not len(tail):
        return HIGHEST
    logs = float((tail / tail[0]).log().sum())
    return min(HIGHEST, 1 + len(tail) / logs) if logs > 0 else HIGHEST
