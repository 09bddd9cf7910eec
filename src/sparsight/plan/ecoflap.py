"""ECoFLaP: what the loss says a block is worth, over all components (Sung et al., arXiv 2310.02998; code ylsung/ECoFLaP).

Zeroth order: |L(W + eps z) - L(W - eps z)| / 2 eps per matrix, z Gaussian, eps = 1e-3, a new z per batch, on 32 samples.
First order: sum |W| |g|, g the gradient of the mean loss. Both are summed over the matrices of a block; each block keeps
1 - cap of its weights and shares the rest of the kept weights in proportion to that sum. The cap is 0.8, or the budget
and 0.1 where that is more (the published BLIP-2 scripts always use the latter).

Where published code goes wrong: forks for vision-language models take W^2 |g| for |W| |g| (in one `"obd" in "aobd"` is
true, so that the branch for the latter is never reached); and after rounding up, which keeps too many weights, the repair
adds the surplus once more where it should take it away. Ours meets the budget in whole zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsight.model.anatomy import Layer
from sparsight.plan.policy import by, size

if TYPE_CHECKING:
    from sparsight.plan.measure import Measure


def ecoflap(layers: Sequence[Layer], budget: Mapping[str, float], measure: Measure) -> dict[str, float]:
    return _per_weight(layers, measure.slopes(layers))


def ecoflap_first(layers: Sequence[Layer], budget: Mapping[str, float], measure: Measure) -> dict[str, float]:
    gradients = measure.gradients(layers)
    return _per_weight(
        layers, {layer.name: float((layer.weight.float() * gradients[layer.name].mean).abs().sum()) for layer in layers}
    )


def _per_weight(layers: Sequence[Layer], scores: Mapping[str, float]) -> dict[str, float]:
    """What a weight of each block is worth, so that kept weights are in proportion to the block's score."""
    worth: dict[str, float] = {}
    for block in by(layers, "block").values():
        mean = sum(scores[layer.name] for layer in block) / sum(size(layer) for layer in block)
        worth |= {layer.name: mean for layer in block}
    return worth
