"""`block` and `dense`: stop in front of every block, and run it as often as the work on it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsight import processes
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.prune.known import Known
from sparsight.prune.lockstep import Call
from sparsight.prune.moments import Moments, pool, real_tokens
from sparsight.prune.permute import permute_block
from sparsight.prune.pruning import Pruning, ratio, seen
from sparsight.prune.reconstruct import Reconstruction, first, parent
from sparsight.prune.record import add_to
from sparsight.prune.sharing import everywhere, prune_all, turns
from sparsight.prune.tokens import left_out

ERROR_BATCHES = 4  # batches a block's output error is measured on


class BlockWalk(Pruning):
    """`block` and `dense`: stop in front of every block, and run it as often as the work on it needs."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.dense = self.choice.propagate == "dense"
        self.pending: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.blocks = 0

    def stops(self, anatomy: Anatomy) -> list[tuple[str, nn.Module]]:
        stops = [(block.name, block.module) for block in anatomy.blocks_with(set(self.plan))]
        self.blocks = len(stops)
        return stops

    def visit(self, name: str, block: nn.Module, calls: Mapping[int, Call]) -> None:
        layers = [layer for layer in self.layers if layer.block == name]
        held = {id(p): p for layer in layers for p in layer.module.parameters(recurse=False)} if self.dense else {}
        before = [p.data.clone() for p in held.values()]
        self.journalled(name, layers, lambda: self._prune_block(name, block, layers, calls))
        for p, value in zip(held.values(), before, strict=True):
            self.pending.append((p, p.data.clone()))
            p.data.copy_(value)
        self.report(name, self.blocks)

    def finish(self) -> None:
        super().finish()
        for p, value in self.pending:
            p.data.copy_(value)

    def _prune_block(self, name: str, block: nn.Module, layers: list[Layer], calls: Mapping[int, Call]) -> dict[str, Any]:
        choice, component = self.choice, layers[0].component
        fitting = None
        if choice.reconstruct:
            fitting = Reconstruction(name, block, layers, calls, lambda i, X: self._real(i, X, component))
        moments, targets = self._observe(block, layers, calls, fitting)
        facts = self._facts(name, layers, moments)
        generator = self.generator(name)
        if choice.permute:
            parents = {layer.name: parent(name, block, layer) for layer in layers}
            facts["permuted"] = permute_block(layers, self.plan, moments, self.sensitivity, parents, calls, generator)
        self._prune_layers(layers, moments, facts)
        if fitting:
            facts["reconstructed"] = fitting.fit(choice.reconstruct, generator)
        return {**facts, "block_errors": {name: self._block_error(component, calls, targets)}}

    def take(self, name: str, known: Known) -> None:
        """Prune one block's layers from what is known of their inputs."""
        layers = [layer for layer in self.layers if layer.block == name]
        moments = known.recall(name, layers, self.choice.tokens.weigh)

        def work() -> dict[str, Any]:
            facts = self._facts(name, layers, moments)
            self._prune_layers(layers, moments, facts)
            return facts

        self.journalled(name, layers, work)
        self.report(name, len({layer.block for layer in self.layers}))

    def _facts(self, name: str, layers: list[Layer], moments: dict[str, Moments]) -> dict[str, Any]:
        pooled = pool(layers, moments)
        return {"tokens": {name: _most(moments)}, "pooled": pooled, "layer_errors": {}, "damping": {}}

    def _prune_layers(self, layers: list[Layer], moments: dict[str, Moments], facts: dict[str, Any]) -> None:
        for layer in layers:
            if layer.name not in moments:
                raise SparsightError(f"{layer.name}: no calibration sample reached this layer; give samples that use it")
        add_to(facts, prune_all(layers, moments, self.prune))

    def _observe(
        self, block: nn.Module, layers: list[Layer], calls: Mapping[int, Call], fitting: Reconstruction | None
    ) -> tuple[dict[str, Moments], dict[int, torch.Tensor]]:
        """Run the block once on every batch: moments of its layers, and its outputs on the first few batches."""
        standing = everywhere(calls)
        watch = self.watch(layers, len(standing))
        dropped = left_out(self.choice.tokens, layers[0].component, calls, self.batches)
        targets: dict[int, torch.Tensor] = {}
        with watch.open():
            for i in turns(standing):
                if i in calls:
                    keeping = fitting.watch(i) if fitting else contextlib.nullcontext()
                    with watch.during(self.batches[i].padding, dropped.get(i)), keeping:
                        output = first(calls[i]())
                    if i in standing[:ERROR_BATCHES]:
                        targets[i] = output
                watch.exchange()
        return watch.moments, targets

    def _real(self, i: int, X: torch.Tensor, component: str) -> torch.Tensor:
        return real_tokens(X, self.batches[i].padding, component)[0]

    def _block_error(self, component: str, calls: Mapping[int, Call], targets: dict[int, torch.Tensor]) -> float:
        mine = {}
        for i, target in targets.items():
            now, then = (self._real(i, X, component).float() for X in (first(calls[i]()), target))
            mine[i] = (now - then).square().sum().cpu(), then.square().sum().cpu()
        difference = reference = torch.zeros(())
        for changed, whole in processes.together(mine).values():
            difference, reference = difference + changed, reference + whole
        return ratio(difference.sqrt(), reference.sqrt())


class Gathering(BlockWalk):
    """Walks as `BlockWalk` does, and keeps what it sees."""

    known: Known

    def visit(self, name: str, block: nn.Module, calls: Mapping[int, Call]) -> None:
        layers = [layer for layer in self.layers if layer.block == name]
        self.known.store(name, self._observe(block, layers, calls, None)[0])
        self.report(name, self.blocks)


def _most(moments: Mapping[str, Moments]) -> dict[str, int]:
    return seen(max(moments.values(), key=lambda m: m.tokens)) if moments else {}
