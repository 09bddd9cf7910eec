"""The two ways to walk calibration batches through a model while its layers are pruned.

`BlockWalk` (`block` and `dense`) stops in front of every block and runs it as often as the work on it needs. `LayerWalk`
(`layer`) stops in front of every layer, in the order in which the model calls them. Both prune a layer by `Work.prune`,
which checks the method's result and measures its error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsight import distributed
from sparsight.calibration.lockstep import Call
from sparsight.calibration.moment_cache import MomentCache
from sparsight.calibration.moments import Moments, pool, real_tokens
from sparsight.calibration.observe import inputs_of_layers
from sparsight.calibration.tokens import dropped_tokens
from sparsight.memory import give_back_memory
from sparsight.model.anatomy import Layer
from sparsight.pruning.across_processes import everywhere, prune_all, turns
from sparsight.pruning.permute import permute_block
from sparsight.pruning.reconstruct import first, parent, reconstruct
from sparsight.pruning.record import add_to
from sparsight.pruning.streamed import StreamJournal
from sparsight.pruning.work import Work, ratio

BEGINS = " begins"  # ends the name of a stop in front of a block; no layer has a space in its name
ERROR_BATCHES = 4  # batches a block's output error is measured on


class BlockWalk:
    """Stops in front of every block: one run to gather moments, one to walk on.

    With `propagate="dense"` the pruned weights are put in place after the last block. To reconstruct blocks, `ahead` takes
    their outputs in the dense model from a second walk, except with `dense`, where the first one is that of the dense model;
    for dense targets, the inputs of their layers, of all batches.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.dense = work, work.composition.propagate == "dense"
        self.stops = [(block.name, block.module) for block in work.blocks]
        self.until = [block.name for block in work.anatomy.blocks_with(set(work.plan))]
        self.pending: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.targets: dict[int, torch.Tensor] = {}  # the dense model's outputs of the block that is visited next
        self.inputs: dict[int, dict[str, torch.Tensor]] = {}  # and its inputs of the block's layers
        self.ahead = self._keep if work.composition.walks_twice else None

    def _keep(self, name: str, i: int, run: Callable[[], Any]) -> None:
        with inputs_of_layers(self.work.of_block(name) if self.work.composition.dense_targets else []) as self.inputs[i]:
            output = run()
        if self.work.composition.reconstruct:
            self.targets[i] = first(output)

    def visit(self, name: str, block: nn.Module, calls: Mapping[int, Call]) -> None:
        """Prune the layers of one block in place."""
        work, composition = self.work, self.work.composition
        layers = work.of_block(name)
        if not layers:
            self.targets = {}
            self.inputs.clear()
            return
        if work.stream is not None:
            work.stream.bring(name)
        before = self._copies(layers)
        targets, self.targets = self.targets, {}
        if not work.recall(name, layers):
            component = layers[0].component
            moments, outputs = self._observe(block, layers, calls)
            facts = start_facts(name, layers, moments)
            layers = [layer for layer in layers if layer.name in moments]
            generator = work.generator(name)
            if composition.permute:
                parents = {layer.name: parent(name, block, layer) for layer in layers}
                facts["permuted"] = permute_block(layers, work.plan, moments, work.sensitivity, parents, calls, generator)
            add_to(facts, prune_all(layers, moments, work.prune))
            del moments
            give_back_memory()
            if epochs := composition.reconstruct:
                wish = outputs if self.dense else targets
                errors = reconstruct(layers, calls, wish, partial(self._real, component=component), epochs, generator)
                facts["reconstructed"] = {name: errors}
            facts["block_errors"] = {name: self._block_error(component, calls, outputs)}
            work.finish_stop(name, work.of_block(name), facts)
        self.inputs.clear()
        for p, value in before:
            if work.stream is None:
                self.pending.append((p, p.data.clone()))
            p.data.copy_(value)
        work.report(name, len(self.until))

    def finish(self) -> None:
        """Put the pruned weights in place, which a walk with `propagate="dense"` does not use."""
        self.work.check_reached()
        for p, value in self.pending:
            p.data.copy_(value)

    def _copies(self, layers: Sequence[Layer]) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Copies of the dense parameters, which the walk still needs; none unless `propagate="dense"`."""
        own = {id(p): p for layer in layers if self.dense for p in layer.module.parameters(recurse=False)}
        return [(p, p.data.clone()) for p in own.values()]

    def _observe(
        self, block: nn.Module, layers: list[Layer], calls: Mapping[int, Call]
    ) -> tuple[dict[str, Moments], dict[int, torch.Tensor]]:
        """Run the block once on every batch: moments of its layers, and its outputs.

        Outputs are those of the first few batches, or of all where blocks are fitted to them.
        """
        work = self.work
        standing = everywhere(calls)
        watch = work.watch(layers, len(standing))
        dropped = dropped_tokens(work.composition.tokens, layers[0].component, calls, work.batches)
        needed = standing if self.dense and work.composition.reconstruct else standing[:ERROR_BATCHES]
        outputs: dict[int, torch.Tensor] = {}
        with watch.open():
            for i in turns(standing):
                if i in calls:
                    with watch.during(work.batches[i].padding, dropped.get(i), self.inputs.pop(i, None)):
                        output = first(calls[i]())
                    if i in needed:
                        outputs[i] = output
                watch.exchange()
        return watch.moments, outputs

    def _real(self, i: int, X: torch.Tensor, component: str) -> torch.Tensor:
        return real_tokens(X, self.work.batches[i].padding, component)[0]

    def _block_error(self, component: str, calls: Mapping[int, Call], outputs: dict[int, torch.Tensor]) -> float:
        mine = {}
        for i in sorted(outputs)[:ERROR_BATCHES]:
            target = outputs[i]
            now, then = (self._real(i, X, component).float() for X in (first(calls[i]()), target))
            mine[i] = (now - then).square().sum().cpu(), then.square().sum().cpu()
        difference = reference = torch.zeros(())
        for changed, whole in distributed.gather_dict(mine).values():
            difference, reference = difference + changed, reference + whole
        return ratio(difference.sqrt(), reference.sqrt())


class CollectWalk(BlockWalk):
    """Walks as `BlockWalk` does, changes nothing, and stores every block's moments in a cache."""

    def __init__(self, work: Work, cache: MomentCache) -> None:
        super().__init__(work)
        self.cache = cache

    def visit(self, name: str, block: nn.Module, calls: Mapping[int, Call]) -> None:
        """Store the moments of one block's layers."""
        self.cache.store(name, self._observe(block, self.work.of_block(name), calls)[0])
        self.work.report(name, len(self.until))


class LayerWalk:
    """Stops in front of every layer, whose inputs are in the stop's arguments: one forward in all.

    Fused experts are one stop: their module runs once for each of its tensors, the later ones on pruned earlier ones.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.layers: dict[str, list[Layer]] = {}
        for layer in work.layers:
            self.layers.setdefault(stop_name(layer), []).append(layer)
        self.stops, self.until = self._stops(), [*self.layers]
        self.inputs: list[weakref.ref[torch.Tensor]] = []  # of the last stop: q, k and v are fed the very same tensors
        self.moments: Moments | None = None

    def _stops(self) -> list[tuple[str, nn.Module]]:
        """The layers; where blocks are brought, each block before its own layers."""
        of_block: dict[str, list[tuple[str, nn.Module]]] = {}
        for name, layers in self.layers.items():
            of_block.setdefault(layers[0].block, []).append((name, layers[0].module))
        if self.work.stream is None:
            return [stop for stops in of_block.values() for stop in stops]
        stops: list[tuple[str, nn.Module]] = []
        for block in self.work.blocks:
            stops += [(f"{block.name}{BEGINS}", block.module), *of_block.get(block.name, ())]
        return stops

    def visit(self, name: str, module: nn.Module, calls: Mapping[int, Call]) -> None:
        """Prune one layer, or the fused experts of one module, in place."""
        if name.endswith(BEGINS):
            if isinstance(self.work.journal, StreamJournal):
                self.work.journal.close()  # of the block before
                self.inputs, self.moments = [], None
            return
        work, layers = self.work, self.layers[name]
        if not work.recall(name, layers):
            facts: dict[str, Any] = {}
            if layers[0].expert is None:
                moments = {name: self._moments(layers[0], calls)}
                add_to(facts, prune_all(layers, moments, work.prune) | {"tokens": {name: token_counts(moments[name])}})
            else:
                self.moments = None  # those of the layer before
                for experts in _by_tensor(layers):
                    add_to(facts, self._prune_experts(name, experts, calls))
            work.finish_stop(name, layers, facts)
            give_back_memory()
        work.report(name, len(self.layers))

    def finish(self) -> None:
        """Record the layers that were not reached."""
        if isinstance(self.work.journal, StreamJournal):
            self.work.journal.close()
        self.work.check_reached()

    def _prune_experts(self, name: str, experts: list[Layer], calls: Mapping[int, Call]) -> dict[str, Any]:
        """Prune the experts of one tensor, whose moments are gone before those of the next one are gathered."""
        moments = self._moments_of_experts(experts, calls)
        facts = start_facts(name, experts, moments)
        add_to(facts, prune_all([x for x in experts if x.name in moments], moments, self.work.prune))
        return facts

    def _moments_of_experts(self, layers: Sequence[Layer], calls: Mapping[int, Call]) -> dict[str, Moments]:
        """The moments of the experts of one tensor: one run of their module."""
        standing = everywhere(calls)
        watch = self.work.watch(layers, len(standing))
        with watch.open():
            for i in turns(standing):
                if i in calls:
                    with watch.during(self.work.batches[i].padding):
                        calls[i]()
                watch.exchange()
        return watch.moments

    def _moments(self, layer: Layer, calls: Mapping[int, Call]) -> Moments:
        """The moments of a layer's inputs; those of the layer before where both are fed the same tensors."""
        inputs = [call.args[0] if call.args else call.keywords["input"] for call in calls.values()]
        same = [*distributed.all_gather(_same(inputs, self.inputs))]
        if self.moments is None or not all(same):
            self.moments = None  # those of the layer before, which are as large
            give_back_memory()  # activations are freed between those that live
            here = dict(zip(calls, inputs, strict=True))
            standing = everywhere(calls)
            watch = self.work.watch([layer], len(standing))
            for i in turns(standing):
                if i in here:
                    with watch.during(self.work.batches[i].padding):
                        watch.see(layer, here[i])
                watch.exchange()
            self.inputs, self.moments = [weakref.ref(X) for X in inputs], watch.moments[layer.name]
        return self.moments


def start_facts(name: str, layers: list[Layer], moments: dict[str, Moments]) -> dict[str, Any]:
    """The tokens of a block before it is pruned; experts that saw too few get the moments of all, in place."""
    pooled = pool(layers, moments)
    most = token_counts(max(moments.values(), key=lambda m: m.tokens)) if moments else {}
    return {"tokens": {name: most}, "pooled": pooled, "layer_errors": {}, "damping": {}}


def stop_name(layer: Layer) -> str:
    """The name of the module that a walk over layers stops at: the layer's, or that of its fused experts."""
    return layer.name.rsplit(".", 2)[0] if layer.expert else layer.name


def _by_tensor(layers: Sequence[Layer]) -> list[list[Layer]]:
    tensors: dict[str, list[Layer]] = {}
    for layer in layers:
        tensors.setdefault(layer.expert[0] if layer.expert else "", []).append(layer)
    return list(tensors.values())


def token_counts(moments: Moments) -> dict[str, int]:
    """Tokens that were summed, by kind."""
    return {name: kind.count for name, kind in moments.kinds.items()}


def _same(these: Sequence[torch.Tensor], those: Sequence[weakref.ref[torch.Tensor]]) -> bool:
    return len(these) == len(those) and all(a is b() for a, b in zip(these, those, strict=True))
