"""ECoFLaP: the importance of a block by the loss, over all components (Sung et al., arXiv 2310.02998; code ylsung/ECoFLaP).

Zeroth order: |L(W + eps z) - L(W - eps z)| / 2 eps per matrix, z Gaussian, eps = 1e-3, a new z per sample, on 32 samples.
First order: sum |W| |g|, g the gradient of the mean loss. Both are summed over the matrices of a block; each block keeps
1 - cap of its weights and shares the rest of the kept weights in proportion to that sum. The cap is the budget and 0.1, as
in the published BLIP-2 scripts.

Ours differs from published code in three places: the published z is drawn per batch, which makes the plan depend on a
setting of memory; forks for vision-language models compute W^2 |g| for |W| |g| (in one
`"obd" in "aobd"` is true, so that the branch for the latter is never reached); and after rounding up, which keeps too many
weights, the repair adds the surplus once more instead of subtracting it. Ours meets the budget in whole zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsight.allocation.policy import by, size
from sparsight.model.anatomy import Layer

if TYPE_CHECKING:
    from sparsight.calibration.probe import Probe


def ecoflap(layers: Sequence[Layer], budget: Mapping[str, float], probe: Probe) -> dict[str, float]:
    """Return importance per weight by layer name: the block's sum of |L(W + eps z) - L(W - eps z)| / 2 eps, by its size.

    The scale is `proportional`. Cost: two forwards per layer and sample, on 32 samples.
    """
    return _per_weight(layers, probe.slopes(layers))


def ecoflap_first(layers: Sequence[Layer], budget: Mapping[str, float], probe: Probe) -> dict[str, float]:
    """Return importance per weight by layer name: the block's sum of |W| |g|, by its size; g the mean of dL/dW.

    The scale is `proportional`. Cost: one forward and backward per sample; two float32 copies of the layers.
    """
    gradients = probe.gradients(layers)
    return _per_weight(
        layers, {layer.name: float((layer.weight.float() * gradients[layer.name].mean).abs().sum()) for layer in layers}
    )


def _per_weight(layers: Sequence[Layer], scores: Mapping[str, float]) -> dict[str, float]:
    """Divide each block's score by its size, so that kept weights are in proportion to the score."""
    worth: dict[str, float] = {}
    for block in by(layers, "block").values():
        mean = sum(scores[layer.name] for layer in block) / sum(size(layer) for layer in block)
        worth |= {layer.name: mean for layer in block}
    return worth
