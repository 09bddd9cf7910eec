"""The two ways to walk calibration batches through a model while its layers are pruned.

`BlockWalk` (`block` and `dense`) stops in front of every block and runs it as often as the work on it needs. `LayerWalk`
(`layer`) stops in front of every layer, in the order in which the model calls them. Both prune a layer by `Work.prune`,
which checks the method's result and measures its error.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsight import distributed
from sparsight.allocation.plan import Plan
from sparsight.calibration.lockstep import Call
from sparsight.calibration.moment_cache import MomentCache
from sparsight.calibration.moments import Moments, pool, real_tokens
from sparsight.calibration.observe import Watch, inputs_of_layers
from sparsight.calibration.tokens import dropped_tokens
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.model.load import overflow_advice
from sparsight.progress import Progress
from sparsight.pruning.across_processes import everywhere, prune_all, turns
from sparsight.pruning.compose import Composition
from sparsight.pruning.journal import Journal
from sparsight.pruning.permute import permute_block
from sparsight.pruning.reconstruct import first, parent, reconstruct
from sparsight.pruning.record import PruneRecord, add_to

ERROR_BATCHES = 4  # batches a block's output error is measured on


@dataclass
class Work:
    """One pruning of one model: the work, and the measurements so far."""

    anatomy: Anatomy
    plan: Plan
    batches: Sequence[Any]
    composition: Composition
    seed: int = 0
    journal: Journal | None = None
    progress: Progress | None = None
    record: PruneRecord = field(default_factory=PruneRecord)
    sensitivity: dict[str, Any] = field(default_factory=dict)  # dL/dW by layer, for methods that need it
    stops: int = 0  # visited so far

    def __post_init__(self) -> None:
        self.layers: list[Layer] = [layer for layer in self.anatomy.layers if layer.name in self.plan]

    def of_block(self, name: str) -> list[Layer]:
        """The planned layers of a block."""
        return [layer for layer in self.layers if layer.block == name]

    def recall(self, name: str, layers: Sequence[Layer]) -> bool:
        """Prune `layers` in place from the journal; False where it does not have this stop."""
        facts = self.journal.recall(name, layers) if self.journal else None
        if facts is not None:
            self.record.add(facts)
        return facts is not None

    def finish_stop(self, name: str, layers: Sequence[Layer], facts: Mapping[str, Any]) -> None:
        """Add the measurements of a stop to the record and the journal."""
        if self.journal:
            self.journal.store(name, layers, dict(facts))
        self.record.add(facts)

    def report(self, name: str, total: int) -> None:
        """Count a stop of `total`."""
        self.stops += 1
        if self.progress:
            self.progress(name, self.stops, total)

    def check_reached(self) -> None:
        """Record the layers that no calibration token reached, which stay dense.

        **Raises** `SparsightError` where nothing of a component was reached.
        """
        unreached = [layer for layer in self.layers if layer.name not in self.record.layer_errors]
        self.record.unreached = [layer.name for layer in unreached]
        reached = {layer.component for layer in self.layers if layer.name in self.record.layer_errors}
        if lost := [layer for layer in unreached if layer.component not in reached]:
            raise SparsightError(
                f"{lost[0].name}: no calibration sample reached this layer, nor any other of {lost[0].component}; give "
                f"samples that use it, or name the other components in `sparsity`"
            )

    def watch(self, layers: Sequence[Layer], batches: int) -> Watch:
        """Accumulators of the moments that the composition needs of these layers."""
        needs, tokens = self.composition.needs, self.composition.tokens
        return Watch(layers, batches, gram="gram" in needs, weigh=tokens.weigh, shared=True)

    def prune(self, layer: Layer, moments: Moments) -> dict[str, Any]:
        """Prune one layer in place; return its relative output error. **Raises** `SparsightError` for invalid inputs."""
        if not moments.tokens:
            raise SparsightError(f"{layer.name}: the token rule left nothing of its inputs; nothing was saved")
        try:
            squares = moments.squares
        except ValueError as error:
            raise SparsightError(f"`tokens`: {error}") from error
        if not torch.isfinite(squares).all():
            advice = overflow_advice(layer.module, "look at the weights and the samples")
            raise SparsightError(f"{layer.name}: its calibration inputs hold NaN or infinity; {advice}; nothing was saved")
        moments.sensitivity = self.sensitivity.get(layer.name)
        W = layer.weight  # (out, in)
        try:
            steps = self.composition.of(layer)
            pruned = steps.prune(W, moments, self.plan[layer.name], generator=self.generator(layer.name))
        except ValueError as error:  # a score or a factor that cannot be
            raise SparsightError(f"{layer.name}: {error}; nothing was saved") from error
        self.check_kept(layer, pruned)
        X = moments.sample().float()  # (k, in)
        difference = torch.linalg.norm(X @ (pruned.float() - W.float()).T)
        reference = torch.linalg.norm(X @ W.float().T)
        layer.write(pruned)
        facts: dict[str, Any] = {"layer_errors": {layer.name: ratio(difference, reference)}}
        if moments.damping > 0.01:
            facts["damping"] = {layer.name: moments.damping}
        if moments.sensitivity is not None and not moments.sensitivity.square.any():
            facts["ungraded"] = [layer.name]
        return facts

    def prune_without_data(self, layer: Layer) -> None:
        """Prune one layer in place by its weights alone."""
        pruned = self.composition.prune(layer.weight, None, self.plan[layer.name], generator=self.generator(layer.name))
        self.check_kept(layer, pruned)
        layer.write(pruned)

    def check_kept(self, layer: Layer, pruned: Any) -> None:
        """**Raises** `SparsightError` for a pruned weight (out, in) that breaks the pattern or the method's `mask_only`."""
        W, pattern = layer.weight, self.plan[layer.name]
        fits = isinstance(pruned, torch.Tensor) and (pruned.shape, pruned.dtype) == (W.shape, W.dtype)
        if not fits or not pattern.holds(pruned) or not pruned.isfinite().all():
            raise SparsightError(
                f"{layer.name}: the method gave no finite {tuple(W.shape)} matrix of {W.dtype} that holds the pattern "
                f"{pattern}; put zeros where `pattern.keep(score)` is False"
            )
        if self.composition.method.mask_only and not self.composition.update and not ((pruned == W) | (pruned == 0)).all():
            raise SparsightError(f"{layer.name}: the method changed kept weights; declare it with mask_only=False")

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that depend on the seed and the name only."""
        return torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))


class BlockWalk:
    """Stops in front of every block: one run to gather moments, one to walk on.

    With `propagate="dense"` the pruned weights are put in place after the last block. To reconstruct blocks, `ahead` takes
    their outputs in the dense model from a second walk, except with `dense`, where the first one is that of the dense model;
    for dense targets, the inputs of their layers, of all batches.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.dense = work, work.composition.propagate == "dense"
        self.stops = [(block.name, block.module) for block in work.anatomy.blocks_with(set(work.plan))]
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
            if epochs := composition.reconstruct:
                wish = outputs if self.dense else targets
                errors = reconstruct(layers, calls, wish, partial(self._real, component=component), epochs, generator)
                facts["reconstructed"] = {name: errors}
            facts["block_errors"] = {name: self._block_error(component, calls, outputs)}
            work.finish_stop(name, work.of_block(name), facts)
        self.inputs.clear()
        for p, value in before:
            self.pending.append((p, p.data.clone()))
            p.data.copy_(value)
        work.report(name, len(self.stops))

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
        self.work.report(name, len(self.stops))


class LayerWalk:
    """Stops in front of every layer, whose inputs are in the stop's arguments: one forward in all.

    Fused experts are one stop: their module runs once for each of its tensors, the later ones on pruned earlier ones.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.layers: dict[str, list[Layer]] = {}
        for layer in work.layers:
            self.layers.setdefault(stop_name(layer), []).append(layer)
        self.stops = [(name, layers[0].module) for name, layers in self.layers.items()]
        self.inputs: list[torch.Tensor] = []  # of the last stop: q, k and v are fed the very same tensors
        self.moments: Moments | None = None

    def visit(self, name: str, module: nn.Module, calls: Mapping[int, Call]) -> None:
        """Prune one layer, or the fused experts of one module, in place."""
        work, layers = self.work, self.layers[name]
        if not work.recall(name, layers):
            facts: dict[str, Any] = {}
            if layers[0].expert is None:
                moments = {name: self._moments(layers[0], calls)}
                add_to(facts, prune_all(layers, moments, work.prune) | {"tokens": {name: token_counts(moments[name])}})
            else:
                for experts in _by_tensor(layers):
                    moments = self._moments_of_experts(experts, calls)
                    add_to(facts, start_facts(name, experts, moments))
                    add_to(facts, prune_all([x for x in experts if x.name in moments], moments, work.prune))
                self.moments = None
            work.finish_stop(name, layers, facts)
        work.report(name, len(self.stops))

    def finish(self) -> None:
        """Record the layers that were not reached."""
        self.work.check_reached()

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
            here = dict(zip(calls, inputs, strict=True))
            standing = everywhere(calls)
            watch = self.work.watch([layer], len(standing))
            for i in turns(standing):
                if i in here:
                    with watch.during(self.work.batches[i].padding):
                        watch.see(layer, here[i])
                watch.exchange()
            self.inputs, self.moments = inputs, watch.moments[layer.name]
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


def ratio(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """A relative error; 0 where there is nothing to compare with."""
    return float(difference / reference) if reference > 0 else 0.0


def _same(these: Sequence[torch.Tensor], those: Sequence[torch.Tensor]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))
