"""Sensitivity: every block is pruned alone, and the change of the answers is measured; then the cheapest zeros come first.

D_b(s) = mean over answer tokens of KL(dense || block b at sparsity s), with Wanda's masks (|W_ij| ||x_j||_2, norms of the
dense model) in every row. The lower convex hull of the measured points makes the problem

    min sum_b D_b(s_b)   such that   sum_b size_b s_b = budget

separable, convex and piecewise linear, so that adding pieces by their slope solves it exactly (Fox, Operations Research
1966). It assumes that the divergences of blocks add up, which holds less and less as blocks empty, so no block gets more
than 0.8, or the budget and 0.1 where that is more; nothing is measured beyond. Our own; blocks of all components share one
budget. At n:m the importance of a layer is its curve's value at 1 - n/m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from sparsight.allocation.policy import CAP, by, ceiling, size
from sparsight.masks.matrix import keep_only
from sparsight.masks.pattern import Pattern
from sparsight.model.anatomy import Layer

if TYPE_CHECKING:
    from sparsight.calibration.probe import Probe

LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def sensitivity(layers: Sequence[Layer], budget: Mapping[str, float], probe: Probe) -> dict[str, list[tuple[float, float]]]:
    """Return a curve by layer name, [(s, D_b(s) / size_b)]: KL per weight with the layer's block pruned alone.

    The scale is `curves`. Cost: two forwards per batch for the norms, then one per block and level on 32 samples.
    """
    blocks = by(layers, "block")
    curves: dict[str, list[tuple[float, float]]] = {}
    for i, (name, block) in enumerate(blocks.items()):
        weights = sum(map(size, block))
        curve = [(level, harm(block, level, probe) / weights) for level in levels(layers, budget)]
        curves |= {layer.name: curve for layer in block}  # per weight, the same for all layers of the block
        probe.progress(f"sensitivity of {name}", i + 1, len(blocks))
    return curves


def levels(layers: Sequence[Layer], budget: Mapping[str, float]) -> list[float]:
    """Return the sparsities to measure at: `LEVELS` up to the cap of a block under this budget, and the cap."""
    mean = sum(budget[layer.component] * size(layer) for layer in layers) / sum(map(size, layers))
    most = ceiling(CAP, mean)
    return [*(level for level in LEVELS if level < most), most]


def harm(block: Sequence[Layer], sparsity: float, probe: Probe) -> float:
    """Return KL(dense || pruned) of the answer tokens with these layers alone pruned; measured once per level."""
    key = ("harm", sparsity, *(layer.name for layer in block))
    return probe.once(key, lambda: probe.divergence(wanda_at(block, sparsity, probe)))


def wanda_at(layers: Sequence[Layer], sparsity: float, probe: Probe) -> dict[str, torch.Tensor]:
    """Return copies of these layers' weights with Wanda's zeros in every row, by name."""
    norms, pattern = probe.norms(layers), Pattern.row(sparsity)
    return {
        layer.name: keep_only(layer.weight, pattern.keep(layer.weight.abs().float() * norms[layer.name])) for layer in layers
    }
