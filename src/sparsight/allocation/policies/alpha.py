"""AlphaPruning: blocks with a heavy-tailed spectrum are well trained and keep more (Lu et al., arXiv 2410.10912; code
haiquanlu/AlphaPruning).

alpha = 1 + n / sum_i ln(lambda_i / lambda_min), the Hill estimate of the power law that the n eigenvalues of W^T W from
lambda_min on follow; averaged over the layers of a block. lambda_min is `alpha_peak`, the published default: of the
eigenvalues from log10(0.95 p) to 1.5 p the one from which on the power law fits best (least Kolmogorov-Smirnov distance),
where p is the lower edge of the fullest of 100 bins of log10 lambda. (The code compares an eigenvalue with a logarithm
there, so that the lower bound seldom binds.) Sparsities are in proportion to a line from 1 - tau at the component's lowest
alpha to 1 + tau at its highest, tau = 0.3, scaled to the component's budget. Needs no data.

Ours differs in two places: eigenvalues that are zero (a pruned or dead row) make the published alpha NaN, here they are
left out; equal alphas make the published code divide by zero, here they spread the budget evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from sparsight.allocation.policy import by, stretched
from sparsight.model.anatomy import Layer

TAU = 0.3
BINS = 100
HIGHEST = 100.0  # equal eigenvalues have no tail at all, and an infinite alpha


def alpha(layers: Sequence[Layer], budget: Mapping[str, float], probe: object = None) -> dict[str, float]:
    """Return importance by layer name, in units of 1 / sparsity: 1 / (1 - tau + 2 tau t), t the block's alpha in 0 .. 1.

    The scale is `inverse`. Data-free; costs one SVD per layer, and a sum over the tail per eigenvalue that may begin it.
    """
    heavy: dict[str, float] = {}
    for block in by(layers, "block").values():
        mean = sum(exponent(layer.weight) for layer in block) / len(block)
        heavy |= {layer.name: mean for layer in block}
    return {name: 1 / (1 - TAU + 2 * TAU * place) for name, place in stretched(heavy, layers).items()}


def exponent(W: torch.Tensor) -> float:  # (out, in)
    """Return the exponent of the tail of W's spectrum, low for a heavy tail: alpha at the best fitting lambda_min."""
    eigenvalues = torch.linalg.svdvals(W.float()).square().double().flip(0).cpu()  # ascending
    eigenvalues = eigenvalues[eigenvalues > 1e-12 * eigenvalues[-1]]
    size = len(eigenvalues)
    if size < 2 or float(eigenvalues[-1] / eigenvalues[0]) < 1 + 1e-9:
        return HIGHEST
    logs = eigenvalues.log()
    above = logs.flip(0).cumsum(0).flip(0) - torch.arange(size, 0, -1) * logs  # sum over the tail of ln(l_j / l_i)
    peak = _peak(eigenvalues)
    best, least = HIGHEST, math.inf
    for i in range(size - 1):
        if not math.log10(0.95 * peak) <= float(eigenvalues[i]) <= 1.5 * peak or above[i] <= 0:
            continue
        count = size - i
        slope = float(count / above[i])  # alpha - 1
        law = 1 - ((logs[i] - logs[i:]) * slope).exp()  # of the eigenvalues up to each
        distance = float((law - torch.arange(count) / count).abs().max())
        if distance < least:
            best, least = 1 + slope, distance
    return min(HIGHEST, best)


def _peak(eigenvalues: torch.Tensor) -> float:
    """Return the lower edge of the fullest bin of log10 of the eigenvalues."""
    logs = eigenvalues.log10()
    low, high = float(logs[0]), float(logs[-1])
    fullest = int(torch.histc(logs, BINS, min=low, max=high).argmax())
    return 10 ** (low + (high - low) * fullest / BINS)
