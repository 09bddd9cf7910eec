"""One component carries the whole budget: all zeros of the uniform policy, evenly over one component.

"Rethinking Pruning for Vision-Language Models" (He et al., arXiv 2404.02424) finds two good settings: equal sparsities, and
pruning the language model only, which has most of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsight.allocation.policy import size
from sparsight.allocation.solver import MOST
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Layer


def language_only(layers: Sequence[Layer], budget: Mapping[str, float], probe: object = None) -> dict[str, float]:
    """Return importance 1 for every language layer by name, and no other, so that the rest stays dense.

    **Raises** `SparsightError` if the language layers cannot hold the zeros of the whole budget.
    """
    return _only("language", layers, budget)


def vision_only(layers: Sequence[Layer], budget: Mapping[str, float], probe: object = None) -> dict[str, float]:
    """Return importance 1 for every vision layer by name, and no other, so that the rest stays dense.

    **Raises** `SparsightError` if the vision layers cannot hold the zeros of the whole budget.
    """
    return _only("vision", layers, budget)


def _only(component: str, layers: Sequence[Layer], budget: Mapping[str, float]) -> dict[str, float]:
    importance = {layer.name: 1.0 for layer in layers if layer.component == component}
    if not importance:
        raise SparsightError(
            f"`policy`: {component}-only puts every zero into {component}, of which `sparsity` and `ignore` leave no layer "
            f"to prune; give {component} a sparsity above 0, or choose another policy"
        )
    zeros = sum(budget[layer.component] * size(layer) for layer in layers)
    room = sum(size(layer) for layer in layers if layer.name in importance)
    if zeros > MOST * room:
        whole = sum(size(layer) for layer in layers)
        raise SparsightError(
            f"`policy`: {component}-only cannot carry `sparsity={zeros / whole:.4g}` of all layers, which is "
            f"{zeros / room:.3g} of {component} alone; ask for less, or choose another policy"
        )
    return importance
