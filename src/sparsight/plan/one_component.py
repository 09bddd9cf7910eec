"""One component carries the whole budget: as many zeros as the uniform policy would put into all of them, evenly over one.

"Rethinking Pruning for Vision-Language Models" (He et al., arXiv 2404.02424) finds that pruning the language model only is
the other good setting beside equal sparsities, the language model being most of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Layer
from sparsight.plan.policy import size
from sparsight.plan.share import MOST


def language_only(layers: Sequence[Layer], budget: Mapping[str, float], measure: object = None) -> dict[str, float]:
    return _only("language", layers, budget)


def vision_only(layers: Sequence[Layer], budget: Mapping[str, float], measure: object = None) -> dict[str, float]:
    return _only("vision", layers, budget)


def _only(component: str, layers: Sequence[Layer], budget: Mapping[str, float]) -> dict[str, float]:
    chosen = {layer.name: 1.0 for layer in layers if layer.component == component}
    if not chosen:
        raise SparsightError(
            f"--policy: {component}-only puts every zero into {component}, of which --sparsity and --ignore leave no layer "
            f"to prune; give {component} a sparsity above 0, or choose another policy"
        )
    zeros = sum(budget[layer.component] * size(layer) for layer in layers)
    room = sum(size(layer) for layer in layers if layer.name in chosen)
    if zeros > MOST * room:
        whole = sum(size(layer) for layer in layers)
        raise SparsightError(
            f"--policy: {component}-only cannot carry --sparsity {zeros / whole:.4g} of all layers, which is "
            f"{zeros / room:.3g} of {component} alone; ask for less, or choose another policy"
        )
    return chosen
