"""Reconstruction of a model that is sparse already: every block's kept weights are fitted to the dense block's outputs.

The walk and the fitting are those of pruning (`prune/reconstruct.py`); only the "method" differs: it puts in what the
sparse model has. No labels and no training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsight import processes
from sparsight.model.anatomy import Anatomy
from sparsight.plan.pattern import Pattern
from sparsight.prune.choice import choose
from sparsight.prune.methods import Method
from sparsight.prune.prune import prune
from sparsight.prune.record import PruneRecord

SAMPLES = 128  # of the training data, as many as pruning takes


@dataclass(frozen=True)
class Given(Pattern):
    """The zeros of a weight (out, in) that is there already."""

    weight: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0), compare=False, repr=False)

    def holds(self, weight: torch.Tensor) -> bool:
        return not bool(weight[self.weight == 0].any())


def _put_in(W: torch.Tensor, moments: Any, pattern: Given, generator: torch.Generator) -> torch.Tensor:
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
    progress: Callable[[str, int, int], None] | None = None,
) -> PruneRecord:
    """Turn `dense` into `sparse`, in place, with the kept weights of the layers `names` fitted to the dense blocks."""
    wanted = set(names)
    pruned = {id(layer.parameter) for layer in anatomy.layers if layer.name in wanted}
    own = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():  # a connector that was trained before stays so
        if id(parameter) not in pruned:
            own[name].copy_(parameter)
    weights = {layer.name: layer.weight for layer in anatomy.layers if layer.name in wanted}
    plan: dict[str, Pattern] = {
        name: Given("tensor", int((W == 0).sum()) / W.numel(), weight=W) for name, W in weights.items()
    }  # fmt: skip
    how = choose(Method(_put_in, needs=frozenset(), mask_only=False), reconstruct=epochs)
    fitted = [layer for layer in dense_anatomy.layers if layer.name in wanted]

    def fit() -> tuple[PruneRecord, list[torch.Tensor]]:
        record = prune(dense, dense_anatomy, plan, batches, method=how, seed=seed, progress=progress)
        return record, [layer.weight for layer in fitted]

    record, made = processes.by_main(fit)  # of several processes one does it, and tells the others
    for layer, W in zip(fitted, made, strict=True):
        layer.write(W)
    return record
