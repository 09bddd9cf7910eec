"""`stage`: stop in front of every layer, in the order in which the model calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsight import processes
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.prune.lockstep import Call
from sparsight.prune.moments import Moments
from sparsight.prune.pruning import Pruning, seen
from sparsight.prune.sharing import everywhere, prune_all, turns


class LayerWalk(Pruning):
    """`stage`: stop in front of every layer, whose inputs are in the stop's arguments."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        for layer in self.layers:
            if layer.expert is not None:
                raise SparsightError(f"--propagate: {layer.name} is one of fused experts; stage stops at layers, use block")
        self.by_name = {layer.name: layer for layer in self.layers}
        self.inputs: list[torch.Tensor] = []  # of the last stop: q, k and v are fed the very same tensors
        self.moments: Moments | None = None

    def stops(self, anatomy: Anatomy) -> list[tuple[str, nn.Module]]:
        return [(layer.name, layer.module) for layer in self.layers]

    def visit(self, name: str, module: nn.Module, calls: Mapping[int, Call]) -> None:
        layer = self.by_name[name]
        self.journalled(name, [layer], lambda: self._prune_layer(layer, calls))
        self.report(name, len(self.layers))

    def _prune_layer(self, layer: Layer, calls: Mapping[int, Call]) -> dict[str, Any]:
        inputs = [call.args[0] if call.args else call.keywords["input"] for call in calls.values()]
        same = [*processes.each(_same(inputs, self.inputs))]
        if self.moments is None or not all(same):
            here = dict(zip(calls, inputs, strict=True))
            standing = everywhere(calls)
            watch = self.watch([layer], len(standing))
            for i in turns(standing):
                if i in here:
                    with watch.during(self.batches[i].padding):
                        watch.see(layer, here[i])
                watch.exchange()
            self.inputs, self.moments = inputs, watch.moments[layer.name]
        return prune_all([layer], {layer.name: self.moments}, self.prune) | {"tokens": {layer.name: seen(self.moments)}}


def _same(these: Sequence[torch.Tensor], those: Sequence[torch.Tensor]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))
