"""OWL: blocks with more outliers keep more (Yin et al., arXiv 2310.05175; code luuyin/OWL).

D_b = share of a block's scores |W_ij| ||x_j||_2 above M times their mean, M = 5; densities lie on a line in D_b, from end to
end 2 lambda apart, lambda = 0.08. One sparsity per block, each component within its own budget, as each is its own model.

Ours differs in two places: the mean that meets the budget counts weights, the published one counts blocks (the same where
all blocks are of one size); and where all blocks have the same share, which the published code divides by zero on, the
budget is spread evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsight.model.anatomy import Layer
from sparsight.plan.policy import by, size, stretched

if TYPE_CHECKING:
    from sparsight.plan.measure import Measure

M = 5.0
LAMBDA = 0.08


def owl(layers: Sequence[Layer], budget: Mapping[str, float], measure: Measure) -> dict[str, float]:
    shares = outliers(layers, measure)
    return {name: 2 * LAMBDA * share for name, share in stretched(shares, layers).items()}


def outliers(layers: Sequence[Layer], measure: Measure) -> dict[str, float]:
    """The share of outliers in the block of every layer."""
    norms = measure.norms(layers)
    found: dict[str, float] = {}
    for block in by(layers, "block").values():
        weights = sum(size(layer) for layer in block)
        mean = sum(float(_score(layer, norms).double().sum()) for layer in block) / weights
        above = sum(int((_score(layer, norms) > M * mean).sum()) for layer in block)
        found |= {layer.name: above / weights for layer in block}
    return found


def _score(layer: Layer, norms):
    return layer.weight.abs().float() * norms[layer.name]  # (out, in) * (in,)
