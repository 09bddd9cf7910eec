"""What every way of walking shares: how one layer is pruned, held to its promise, and written down."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.plan.plan import Plan
from sparsight.prune.known import Known
from sparsight.prune.lockstep import Call
from sparsight.prune.moments import Moments, Watch
from sparsight.prune.record import PruneRecord


class Pruning:
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
        facts: dict[str, Any] = {"layer_errors": {layer.name: ratio(difference, reference)}}
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


def seen(moments: Moments) -> dict[str, int]:
    return {name: kind.count for name, kind in moments.kinds.items()}


def ratio(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return float(difference / reference) if reference > 0 else 0.0
