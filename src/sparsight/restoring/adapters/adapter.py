"""The record of an adapter: how factors change a frozen weight under its mask, and their gradients from dL/dE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsight.masks.bits import unpack

Factors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Adapter:
    """One way to train a pruned layer: E = effective(W, factors) under the packed mask of W (out, in).

    `names` are those of the factors, and `start(W, packed, rank)` gives their first values, float32. `effective(W, factors,
    scaling, packed)` is one float32 expression (float64 for float64 weights), rounded once to W's dtype, +0 where the mask
    is 0. `project(dE, W, factors, scaling, packed)` gives a gradient per factor; `shortcut(g, x, factors, scaling)` does the
    same from g (tokens, out) and x (tokens, in), without dE. `stock`: the layer is PEFT's own LoRA, without a mask, so that
    its merge is dense. `shapes(out, in, rank, density)` gives the factors' shapes for a layer that keeps the fraction
    `density` of its weights; None: the adapter's cost is not known. `rate`: its learning rate, in SparseLoRA's.
    """

    names: tuple[str, ...] = ()
    start: Callable[[torch.Tensor, torch.Tensor | None, int], Factors] = lambda W, packed, rank: ()
    effective: Callable[..., torch.Tensor] = lambda W, factors, scaling, packed: masked(W.clone(), packed)
    project: Callable[..., Factors] = lambda dE, W, factors, scaling, packed: ()
    shortcut: Callable[[torch.Tensor, torch.Tensor, Factors, float], Factors] | None = None
    stock: bool = False
    shapes: Callable[[int, int, int, float], tuple[tuple[int, ...], ...]] | None = None
    rate: float = 1.0

    @property
    def masked(self) -> bool:
        """Whether every zero survives the merge."""
        return not self.stock


def masked(E: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
    """E (out, in) with zeros where the mask has them, in place; as it is without a mask."""
    return E if packed is None else E.masked_fill_(~unpack(packed, E.shape), 0)


def wide(W: torch.Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or W's own if it is wider."""
    return torch.promote_types(W.dtype, torch.float32)
