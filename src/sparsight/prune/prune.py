"""The loop: walk the calibration batches through the blocks, gather moments, prune, measure what it cost."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.plan.budget import nearest
from sparsight.plan.plan import Plan
from sparsight.prune.journal import Journal
from sparsight.prune.lockstep import Call, lockstep
from sparsight.prune.methods import Method, find_method
from sparsight.prune.moments import Moments, Watch, real_tokens

PROPAGATE = ("dense", "block")
ERROR_BATCHES = 4  # batches a block's output error is measured on


@dataclass
class PruneRecord:
    """What pruning did: relative output errors ||f'(x) - f(x)|| / ||f(x)|| per layer and per block."""

    layer_errors: dict[str, float] = field(default_factory=dict)
    block_errors: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)  # calibration tokens each block has seen, without padding
    seconds: float = 0.0


def prune(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    batches: Sequence[Any],
    *,
    method: str | Method | Callable = "wanda",
    propagate: str = "block",
    seed: int = 0,
    journal: Journal | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> PruneRecord:
    """Prune `model` in place as `plan` says.

    `batches` have `.inputs` (what `model(**inputs)` takes) and `.padding` (masks of real tokens). `propagate="block"`
    lets later blocks see what the pruned earlier ones put out; with `"dense"` every block is pruned on the dense model's
    activations, and no weight changes before the walk is over. Blocks that the `journal` holds are taken from there.
    `progress(block, done, all)` is called per block.

    **Raises** `SparsightError` before anything is changed for an unknown method or `propagate`, and, naming the layer,
    for a NaN or infinity in weights or inputs or a layer that no calibration token reached.
    """
    how = find_method(method)
    check_propagate(propagate)
    began = time.perf_counter()
    walk = _Pruning(anatomy, plan, batches, how, propagate, seed, journal, progress)
    for layer in walk.layers:
        if not torch.isfinite(layer.weight).all():
            raise SparsightError(f"{layer.name}: the weights hold NaN or infinity; nothing was pruned")
    if not batches:
        if how.needs is not None:
            raise SparsightError("--data: this method needs calibration samples; give --data, or --method magnitude")
        for layer in walk.layers:
            layer.write(walk.pruned(layer, None))
        walk.record.seconds = time.perf_counter() - began
        return walk.record
    blocks = [(block.name, block.module) for block in anatomy.blocks_with(set(plan))]
    training = model.training
    model.eval()
    try:
        lockstep(model, blocks, [batch.inputs for batch in batches], walk.visit)
    finally:
        model.train(training)
    walk.finish()
    walk.record.seconds = time.perf_counter() - began
    return walk.record


def check_propagate(propagate: str) -> None:
    if propagate not in PROPAGATE:
        raise SparsightError(f"--propagate: unknown value {propagate!r}; {nearest(propagate, PROPAGATE)}")


class _Pruning:
    def __init__(self, anatomy, plan, batches, method, propagate, seed, journal, progress) -> None:
        self.layers: list[Layer] = [layer for layer in anatomy.layers if layer.name in plan]
        self.blocks = len(anatomy.blocks_with(set(plan)))
        self.plan, self.batches, self.method, self.seed = plan, batches, method, seed
        self.dense, self.journal, self.progress = propagate == "dense", journal, progress
        self.record = PruneRecord()
        self.pending: dict[str, torch.Tensor] = {}

    def visit(self, name: str, block: nn.Module, calls: Mapping[int, Call]) -> None:
        layers = [layer for layer in self.layers if layer.block == name]
        before = {layer.name: layer.weight.clone() for layer in layers} if self.dense else {}
        facts = self.journal.recall(name, layers) if self.journal else None
        if facts is None:
            facts = self._prune_block(layers, calls)
            if self.journal:
                self.journal.store(name, layers, facts)
        self.record.layer_errors.update(facts["layer_errors"])
        self.record.block_errors[name] = facts["block_error"]
        self.record.tokens[name] = facts["tokens"]
        if self.dense:
            for layer in layers:
                self.pending[layer.name] = layer.weight.clone()
                layer.write(before[layer.name])
        if self.progress:
            self.progress(name, len(self.record.block_errors), self.blocks)

    def _prune_block(self, layers: list[Layer], calls: Mapping[int, Call]) -> dict[str, Any]:
        moments, targets = self._observe(layers, calls)
        errors = {}
        for layer in layers:
            if layer.name not in moments:
                raise SparsightError(f"{layer.name}: no calibration sample reached this layer; give samples that use it")
            errors[layer.name] = self._prune(layer, moments[layer.name])
        return {
            "layer_errors": errors,
            "block_error": self._block_error(layers[0].component, calls, targets),
            "tokens": max(m.count for m in moments.values()),
        }

    def finish(self) -> None:
        unreached = [layer.name for layer in self.layers if layer.name not in self.record.layer_errors]
        if unreached:
            raise SparsightError(
                f"{unreached[0]}: no calibration sample reached this layer"
                f"{f' nor {len(unreached) - 1} others' if len(unreached) > 1 else ''}; give samples that use it"
            )
        for layer in self.layers:
            if layer.name in self.pending:
                layer.write(self.pending[layer.name])

    def _observe(self, layers: list[Layer], calls: Mapping[int, Call]) -> tuple[dict[str, Moments], dict]:
        """Run the block once on every batch: moments of its layers, and its outputs on the first few batches."""
        watch = Watch(layers, len(calls))
        targets: dict[int, torch.Tensor] = {}
        with watch.open():
            for i, call in calls.items():
                with watch.during(self.batches[i].padding):
                    output = _tensor(call())
                if len(targets) < ERROR_BATCHES:
                    targets[i] = output
        return watch.moments, targets

    def _prune(self, layer: Layer, moments: Moments) -> float:
        """Prune one layer in place; its relative output error on the kept inputs."""
        if not torch.isfinite(moments.squares).all():
            raise SparsightError(f"{layer.name}: its calibration inputs hold NaN or infinity; nothing was saved")
        W, pruned = layer.weight, self.pruned(layer, moments)  # (out, in)
        X = moments.sample().float()  # (k, in)
        difference = torch.linalg.norm(X @ (pruned.float() - W.float()).T)
        reference = torch.linalg.norm(X @ W.float().T)
        layer.write(pruned)
        return _ratio(difference, reference)

    def pruned(self, layer: Layer, moments: Moments | None) -> torch.Tensor:
        """What the method makes of a layer's weight (out, in), held to its promise."""
        W, pattern = layer.weight, self.plan[layer.name]
        pruned = self.method.prune(W, moments, pattern, generator=self.generator(layer))
        if (pruned.shape, pruned.dtype) != (W.shape, W.dtype) or not pattern.holds(pruned) or not pruned.isfinite().all():
            raise SparsightError(
                f"{layer.name}: the method gave no finite {tuple(W.shape)} matrix of {W.dtype} that holds the pattern "
                f"{pattern}; put zeros where `pattern.keep(score)` is False"
            )
        return pruned

    def generator(self, layer: Layer) -> torch.Generator:
        """Random numbers that depend on the seed and the layer's name only."""
        return torch.Generator().manual_seed(self.seed ^ zlib.crc32(layer.name.encode()))

    def _block_error(self, component: str, calls: Mapping[int, Call], targets: dict) -> float:
        difference = reference = torch.zeros(())
        for i, target in targets.items():
            padding = self.batches[i].padding
            now = real_tokens(_tensor(calls[i]()), padding, component).float()
            then = real_tokens(target, padding, component).float()
            difference = difference + (now - then).square().sum().cpu()
            reference = reference + then.square().sum().cpu()
        return _ratio(difference.sqrt(), reference.sqrt())


def _tensor(output: Any) -> torch.Tensor:
    """A block's hidden states, whether it returns them alone or first in a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _ratio(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return float(difference / reference) if reference > 0 else 0.0
