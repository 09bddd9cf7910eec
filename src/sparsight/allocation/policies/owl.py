"""OWL: blocks with more outliers keep more (Yin et al., arXiv 2310.05175; code luuyin/OWL).

D_b = share of a block's scores |W_ij| ||x_j||_2 above M times their mean, M = 5; densities lie on a line in D_b, whose ends
are 2 lambda apart, lambda = 0.08. One sparsity per block; each component meets its own budget, as a model of its own.

Ours differs in two places: the mean that meets the budget counts weights, the published one counts blocks (the same where
all blocks are of one size); and equal shares make the published code divide by zero, here they spread the budget evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsight.allocation.policy import by, size, stretched
from sparsight.model.anatomy import Layer

if TYPE_CHECKING:
    from sparsight.calibration.probe import Probe

M = 5.0
LAMBDA = 0.08


def owl(layers: Sequence[Layer], budget: Mapping[str, float], probe: Probe) -> dict[str, float]:
    """Return importance by layer name, in units of sparsity: 2 lambda (D_b - min D) / (max D - min D), per component.

    The scale is `shift`: sparsity = level - importance. Cost: two forwards per batch, for the norms.
    """
    shares = outliers(layers, probe)
    return {name: 2 * LAMBDA * share for name, share in stretched(shares, layers).items()}


def outliers(layers: Sequence[Layer], probe: Probe) -> dict[str, float]:
    """Return the share of outliers D_b in the block of every layer, by layer name."""
    norms = probe.norms(layers)
    shares: dict[str, float] = {}
    for block in by(layers, "block").values():
        weights = sum(size(layer) for layer in block)
        mean = sum(float(_score(layer, norms).double().sum()) for layer in block) / weights
        above = sum(int((_score(layer, norms) > M * mean).sum()) for layer in block)
        shares |= {layer.name: above / weights for layer in block}
    return shares


def _score(layer: Layer, norms):
    return layer.weight.abs().float() * norms[layer.name]  # (out, in) * (in,)
