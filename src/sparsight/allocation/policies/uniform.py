"""Uniform: every layer of a component carries the component's sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsight.model.anatomy import Layer


def uniform(layers: Sequence[Layer], budget: Mapping[str, float], probe: object = None) -> dict[str, float]:
    """Return sparsity by layer name: the budget of the layer's component."""
    return {layer.name: budget[layer.component] for layer in layers}
