"""Sensitivity: every block is pruned alone, and the harm to the answers is measured; then the cheapest zeros come first.

D_b(s) = mean over answer tokens of KL(dense || block b at sparsity s), with Wanda's masks (|W_ij| ||x_j||_2, norms of the
dense model) in every row. The lower convex hull of the measured points makes the problem

    min sum_b D_b(s_b)   such that   sum_b size_b s_b = budget

separable, convex and piecewise linear, so that taking pieces by their slope solves it exactly (Fox, Operations Research
1966). It takes the harms of blocks for additive, which they are less and less as blocks empty, so no block gets more than
0.8, or the budget and 0.1 where that is more; nothing is measured beyond. Our own; blocks of all components share one
budget. At n:m what a layer is worth is what its curve says at 1 - n/m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from sparsight.model.anatomy import Layer
from sparsight.plan.pattern import Pattern
from sparsight.plan.policy import CAP, by, ceiling, size

if TYPE_CHECKING:
    from sparsight.plan.measure import Measure

LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def sensitivity(
    layers: Sequence[Layer], budget: Mapping[str, float], measure: Measure
) -> dict[str, list[tuple[float, float]]]:
    blocks = by(layers, "block")
    curves: dict[str, list[tuple[float, float]]] = {}
    for done, (name, block) in enumerate(blocks.items()):
        weights = sum(map(size, block))
        curve = [(level, harm(block, level, measure) / weights) for level in levels(layers, budget)]
        curves |= {layer.name: curve for layer in block}  # per weight, the same for all layers of the block
        measure.progress(f"sensitivity of {name}", done + 1, len(blocks))
    return curves


def levels(layers: Sequence[Layer], budget: Mapping[str, float]) -> list[float]:
    """The sparsities to measure at: `LEVELS` up to what a block may get under this budget."""
    mean = sum(budget[layer.component] * size(layer) for layer in layers) / sum(map(size, layers))
    most = ceiling(CAP, mean)
    return [*(level for level in LEVELS if level < most), most]


def harm(block: Sequence[Layer], sparsity: float, measure: Measure) -> float:
    """The divergence of the answers when these layers alone are pruned; measured once."""
    key = ("harm", sparsity, *(layer.name for layer in block))
    return measure.once(key, lambda: measure.divergence(wanda_at(block, sparsity, measure)))


def wanda_at(layers: Sequence[Layer], sparsity: float, measure: Measure) -> dict[str, torch.Tensor]:
    """The weights of these layers with Wanda's zeros."""
    norms, pattern = measure.norms(layers), Pattern.row(sparsity)
    return {
        layer.name: layer.weight.masked_fill(~pattern.keep(layer.weight.abs().float() * norms[layer.name]), 0)
        for layer in layers
    }
