"""The loop: walk the calibration batches through the blocks, gather moments, prune, measure what it cost.

`propagate="block"` stops in front of every block, as the papers do: one run of the block to gather moments, one to walk
on, so two forwards in all. `"dense"` does the same and changes no weight before the walk is over. `"stage"` stops in
front of every layer, in the order in which the model calls them: a layer's inputs are in its stop's arguments, and later
layers of the same block see what the pruned earlier ones put out; nothing runs twice, so one forward in all, at the price
of holding the activations inside a block for all batches.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsight import processes
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.plan.pattern import Pattern
from sparsight.plan.plan import Plan
from sparsight.prune.choice import Choice, choose, refuse_many
from sparsight.prune.gradients import evaluating, gradients
from sparsight.prune.journal import Journal
from sparsight.prune.known import Known, served
from sparsight.prune.lockstep import Call
from sparsight.prune.moments import Moments, Watch, pool, real_tokens
from sparsight.prune.permute import permute_block
from sparsight.prune.reconstruct import Reconstruction, first, parent
from sparsight.prune.record import PruneRecord, add_to
from sparsight.prune.sharing import everywhere, prune_all, turns, walk
from sparsight.prune.tokens import left_out

ERROR_BATCHES = 4  # batches a block's output error is measured on


def prune(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    batches: Sequence[Any],
    *,
    method: str | Choice | Callable | Any = "wanda",
    seed: int = 0,
    journal: Journal | None = None,
    known: Known | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> PruneRecord:
    """Prune `model` in place as `plan` says.

    `batches` have `.inputs` (what `model(**inputs)` takes) and `.padding` (masks of real tokens). `method` is a name, a
    function, a `Method` or a `Choice`; `options` are those of `choose`. Blocks that the `journal` holds are taken from
    there. With `known`, which `know` has filled from the same model and batches, nothing is run: the weights are those of
    `propagate="dense"`, and no errors of blocks are measured. `progress(stop, done, all)` is called per stop.

    On several processes every one is given the same model and all batches, walks its share of them and prunes its share
    of the layers; all end with the weights of one process alone, bit for bit (given as many threads).

    **Raises** `SparsightError` before anything is changed for an unknown name or a combination that makes no sense, and,
    naming the layer, for a NaN or infinity in weights or inputs or a layer that no calibration token reached.
    """
    choice = method if isinstance(method, Choice) else choose(method, **options)
    refuse_many(choice, processes.count())
    if known and not served(choice):
        raise SparsightError("known moments serve --propagate dense, without --reconstruct, --permute and gradients")
    began = time.perf_counter()
    work = (_Layers if choice.propagate == "stage" else _Blocks)(anatomy, plan, batches, choice, seed, journal, progress)
    for layer in work.layers:
        if not torch.isfinite(layer.weight).all():
            raise SparsightError(f"{layer.name}: the weights hold NaN or infinity; nothing was pruned")
    if known:
        for block in anatomy.blocks_with(set(plan)):
            work.take(block.name, known)
        work.finish()
    elif not batches:
        if choice.needs:
            raise SparsightError(
                "--data: this way of pruning needs calibration samples; give --data, or magnitude without further steps"
            )
        for layer in work.layers:
            layer.write(work.pruned(layer, None))
    else:
        with evaluating(model):
            if "gradient" in choice.needs:
                work.sensitivity = gradients(model, work.layers, batches)
            walk(model, work.stops(anatomy), batches, work.visit)
        work.finish()
    work.record.seconds = time.perf_counter() - began
    return work.record


def know(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Any],
    known: Known,
    *,
    method: str | Choice | Callable | Any = "wanda",
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> None:
    """Fill `known` with what `method` needs to know of every layer of the dense model: one walk, nothing is changed."""
    choice = method if isinstance(method, Choice) else choose(method, **options)
    plan = {layer.name: Pattern.row(0.5) for layer in anatomy.layers}  # every layer; no zeros are made
    work = _Gathering(anatomy, plan, batches, choice, 0, None, progress)
    work.known = known
    with evaluating(model):
        walk(model, work.stops(anatomy), batches, work.visit)
    known.finish()


class _Pruning:
    """What the two ways of walking share: how one layer is pruned, and what is written down."""

    def __init__(self, anatomy, plan, batches, choice, seed, journal, progress) -> None:
        self.layers: list[Layer] = [layer for layer in anatomy.layers if layer.name in plan]
        self.plan: Plan = plan
        self.batches, self.choice, self.seed = batches, choice, seed
        self.journal, self.progress = journal, progress
        self.record = PruneRecord()
        self.sensitivity: dict[str, Any] = {}
        self.done = 0

    def stops(self, anatomy: Anatomy) -> list[tuple[str, nn.Module]]:
        raise NotImplementedError

    def visit(self, name: str, module: nn.Module, calls: Mapping[int, Call]) -> None:
        raise NotImplementedError

    def take(self, name: str, known: Known) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        unreached = [layer.name for layer in self.layers if layer.name not in self.record.layer_errors]
        if unreached:
            raise SparsightError(
                f"{unreached[0]}: no calibration sample reached this layer"
                f"{f' nor {len(unreached) - 1} others' if len(unreached) > 1 else ''}; give samples that use it"
            )

    def journalled(self, name: str, layers: Sequence[Layer], work: Callable[[], dict[str, Any]]) -> None:
        """Take a stop from the journal, or do it and write it there."""
        facts = self.journal.recall(name, layers) if self.journal else None
        if facts is None:
            facts = work()
            if self.journal:
                self.journal.store(name, layers, facts)
        self.record.add(facts)

    def report(self, name: str, every: int) -> None:
        self.done += 1
        if self.progress:
            self.progress(name, self.done, every)

    def watch(self, layers: Sequence[Layer], batches: int) -> Watch:
        return Watch(layers, batches, gram="gram" in self.choice.needs, weigh=self.choice.tokens.weigh, shared=True)

    def prune(self, layer: Layer, moments: Moments) -> dict[str, Any]:
        """Prune one layer in place; its relative output error on the kept inputs."""
        if not moments.tokens:
            raise SparsightError(f"{layer.name}: the token rule left nothing of its inputs; nothing was saved")
        try:
            squares = moments.squares
        except ValueError as error:
            raise SparsightError(f"--tokens: {error}") from error
        if not torch.isfinite(squares).all():
            raise SparsightError(f"{layer.name}: its calibration inputs hold NaN or infinity; nothing was saved")
        W, pruned = layer.weight, self.pruned(layer, moments)  # (out, in)
        X = moments.sample().float()  # (k, in)
        difference = torch.linalg.norm(X @ (pruned.float() - W.float()).T)
        reference = torch.linalg.norm(X @ W.float().T)
        layer.write(pruned)
        facts: dict[str, Any] = {"layer_errors": {layer.name: _ratio(difference, reference)}}
        if moments.damping > 0.01:
            facts["damping"] = {layer.name: moments.damping}
        if moments.sensitivity is not None and not moments.sensitivity.square.any():
            facts["ungraded"] = [layer.name]
        return facts

    def pruned(self, layer: Layer, moments: Moments | None) -> torch.Tensor:
        """What the method makes of a layer's weight (out, in), held to its promise."""
        W, pattern = layer.weight, self.plan[layer.name]
        if moments is not None:
            moments.sensitivity = self.sensitivity.get(layer.name)
        try:
            pruned = self.choice.prune(W, moments, pattern, generator=self.generator(layer.name))
        except ValueError as error:  # a score or a factor that cannot be
            raise SparsightError(f"{layer.name}: {error}; nothing was saved") from error
        fits = isinstance(pruned, torch.Tensor) and (pruned.shape, pruned.dtype) == (W.shape, W.dtype)
        if not fits or not pattern.holds(pruned) or not pruned.isfinite().all():
            raise SparsightError(
                f"{layer.name}: the method gave no finite {tuple(W.shape)} matrix of {W.dtype} that holds the pattern "
                f"{pattern}; put zeros where `pattern.keep(score)` is False"
            )
        if self.choice.method.mask_only and not self.choice.update and not ((pruned == W) | (pruned == 0)).all():
            raise SparsightError(f"{layer.name}: the method changed kept weights; declare it with mask_only=False")
        return pruned

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that depend on the seed and the name only."""
        return torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))


class _Layers(_Pruning):
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
        return prune_all([layer], {layer.name: self.moments}, self.prune) | {"tokens": {layer.name: _seen(self.moments)}}


class _Blocks(_Pruning):
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
        return _ratio(difference.sqrt(), reference.sqrt())


class _Gathering(_Blocks):
    """Walks as `_Blocks` does, and keeps what it sees."""

    known: Known

    def visit(self, name: str, block: nn.Module, calls: Mapping[int, Call]) -> None:
        layers = [layer for layer in self.layers if layer.block == name]
        self.known.store(name, self._observe(block, layers, calls, None)[0])
        self.report(name, self.blocks)


def _same(these: Sequence[torch.Tensor], those: Sequence[torch.Tensor]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))


def _seen(moments: Moments) -> dict[str, int]:
    return {name: kind.count for name, kind in moments.kinds.items()}


def _most(moments: Mapping[str, Moments]) -> dict[str, int]:
    return _seen(max(moments.values(), key=lambda m: m.tokens)) if moments else {}


def _ratio(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return float(difference / reference) if reference > 0 else 0.0
