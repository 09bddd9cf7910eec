"""AlphaPruning: blocks with a heavy-tailed spectrum are well trained and keep more (Lu et al., arXiv 2410.10912; code
haiquanlu/AlphaPruning).

alpha = 1 + n / sum_i ln(lambda_i / lambda_min), the Hill estimate of the power law that the largest half of the
eigenvalues of W^T W follow; averaged over the layers of a block. Sparsities are in proportion to a line from 1 - tau at
the component's lowest alpha to 1 + tau at its highest, tau = 0.3, scaled to the component's budget. Needs no data.

Ours differs in two places: eigenvalues that are zero (a pruned or dead row) make the published alpha NaN, here they are
left out; equal alphas make the published code divide by zero, here they spread the budget evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sparsight.allocation.policy import by, stretched
from sparsight.model.anatomy import Layer

TAU = 0.3
HIGHEST = 100.0  # equal eigenvalues have no tail at all, and an infinite alpha


def alpha(layers: Sequence[Layer], budget: Mapping[str, float], probe: object = None) -> dict[str, float]:
    """Return importance by layer name, in units of 1 / sparsity: 1 / (1 - tau + 2 tau t), t the block's alpha in 0 .. 1.

    The scale is `inverse`. Data-free; costs one SVD per layer.
    """
    heavy: dict[str, float] = {}
    for block in by(layers, "block").values():
        mean = sum(hill(layer.weight) for layer in block) / len(block)
        heavy |= {layer.name: mean for layer in block}
    return {name: 1 / (1 - TAU + 2 * TAU * place) for name, place in stretched(heavy, layers).items()}


def hill(W: torch.Tensor) -> float:  # (out, in)
    """Return the exponent of the tail of W's spectrum, low for a heavy tail: 1 + n / sum_i ln(l_i / l_min). One SVD."""
    eigenvalues = torch.linalg.svdvals(W.float()).square().double().flip(0)  # ascending
    eigenvalues = eigenvalues[eigenvalues > 1e-12 * eigenvalues[-1]]
    tail = eigenvalues[len(eigenvalues) // 2 :]
    if not len(tail):
        return HIGHEST
    logs = float((tail / tail[0]).log().sum())
    return min(HIGHEST, 1 + len(tail) / logs) if logs > 0 else HIGHEST
