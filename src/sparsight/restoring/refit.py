"""Reconstruction of a model that is sparse already: every block's kept weights are fitted to the dense block's outputs.

The walk and the fitting are those of pruning (`pruning/reconstruct.py`); only the "method" differs: it returns the weights
of the sparse model. No labels and no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsight import distributed
from sparsight.masks.matrix import count_zeros
from sparsight.masks.pattern import Pattern
from sparsight.model.anatomy import Anatomy
from sparsight.progress import Progress
from sparsight.pruning.compose import compose
from sparsight.pruning.loop import prune
from sparsight.pruning.methods import Method
from sparsight.pruning.record import PruneRecord

SAMPLES = 128  # of the training data, as many as pruning takes


@dataclass(frozen=True)
class FixedPattern(Pattern):
    """The zeros of an existing weight (out, in)."""

    weight: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0), compare=False, repr=False)

    def surplus(self, weight: torch.Tensor) -> int | None:
        """How many zeros `weight` has beyond those of the existing weight; None where it has lost one of these."""
        lost = bool(weight[self.weight == 0].any())
        return None if lost else count_zeros(weight) - count_zeros(self.weight)


def _put_in(W: torch.Tensor, moments: Any, pattern: FixedPattern, generator: torch.Generator) -> torch.Tensor:
    return pattern.weight


@torch.no_grad()
def refit(
    dense: Any,
    dense_anatomy: Anatomy,
    sparse: Any,
    anatomy: Anatomy,
    names: Sequence[str],
    batches: Sequence[Any],
    epochs: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruneRecord:
    """Turn `dense` into `sparse`, in place, with the kept weights of the layers `names` fitted to the dense blocks.

    The targets are the outputs of `dense` as it comes, also where `sparse` differs from it outside these layers.
    """
    targets = set(names)
    pruned = {id(layer.parameter) for layer in anatomy.layers if layer.name in targets}
    own = dict(dense.named_parameters())
    original: dict[torch.Tensor, torch.Tensor] = {}
    for name, parameter in sparse.named_parameters():  # a connector that was trained before stays so
        if id(parameter) not in pruned and not torch.equal(own[name], parameter):
            original[own[name]] = own[name].clone()
            own[name].copy_(parameter)
    weights = {layer.name: layer.weight for layer in anatomy.layers if layer.name in targets}
    plan: dict[str, Pattern] = {
        name: FixedPattern("tensor", count_zeros(W) / W.numel(), weight=W) for name, W in weights.items()
    }  # fmt: skip
    composition = compose(Method(_put_in, needs=frozenset(), mask_only=False), reconstruct=epochs)
    fitted = [layer for layer in dense_anatomy.layers if layer.name in targets]

    def fit() -> tuple[PruneRecord, list[torch.Tensor]]:
        record = prune(
            dense, dense_anatomy, plan, batches, method=composition, seed=seed, original=original, progress=progress
        )  # fmt: skip
        return record, [layer.weight for layer in fitted]

    record, weights_of_main = distributed.on_main(fit)  # the main process computes and broadcasts
    for layer, W in zip(fitted, weights_of_main, strict=True):
        layer.write(W)
    return record
