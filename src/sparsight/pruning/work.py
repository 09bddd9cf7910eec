"""One pruning of one model: its settings, its measurements so far, and how a single layer is pruned in it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsight.allocation.plan import Plan
from sparsight.calibration.moments import Moments
from sparsight.calibration.observe import Watch
from sparsight.errors import SparsightError
from sparsight.kernels.sparse import has_tiles
from sparsight.masks.matrix import are_same, is_finite, mask_of
from sparsight.model.anatomy import Anatomy, Block, Layer
from sparsight.model.load import overflow_advice
from sparsight.model.stream import Stream
from sparsight.progress import Progress
from sparsight.pruning.compose import Composition
from sparsight.pruning.journal import Journal
from sparsight.pruning.record import PruneRecord
from sparsight.pruning.streamed import StreamJournal

MANY = 4096  # outputs, from which on their roundings to bfloat16 cancel in a norm
SPARSER = 0.01  # of a layer's weights, from which on more zeros than planned are said


@dataclass
class Work:
    """One pruning of one model: the work, and the measurements so far."""

    anatomy: Anatomy
    plan: Plan
    batches: Sequence[Any]
    composition: Composition
    seed: int = 0
    journal: Journal | StreamJournal | None = None
    progress: Progress | None = None
    record: PruneRecord = field(default_factory=PruneRecord)
    sensitivity: dict[str, Any] = field(default_factory=dict)  # dL/dW by layer, for methods that need it
    stops: int = 0  # visited so far

    def __post_init__(self) -> None:
        self.layers: list[Layer] = [layer for layer in self.anatomy.layers if layer.name in self.plan]

    @property
    def stream(self) -> Stream | None:
        """The model, where it is in memory block by block."""
        return self.journal.stream if isinstance(self.journal, StreamJournal) else None

    @property
    def blocks(self) -> list[Block]:
        """The blocks that a walk stops at: those with planned layers, and where blocks are brought, those between them."""
        return [*(self.anatomy.blocks_with(set(self.plan)) if self.stream is None else self.anatomy.blocks)]

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
        surplus = self.check_kept(layer, pruned)
        facts: dict[str, Any] = {"layer_errors": {layer.name: output_error(moments.sample(), W, pruned)}}
        layer.write(pruned)
        if moments.damping > 0.01:
            facts["damping"] = {layer.name: moments.damping}
        if moments.sensitivity is not None and not moments.sensitivity.square.any():
            facts["ungraded"] = [layer.name]
        return facts | self.sparser(layer, surplus)

    def sparser(self, layer: Layer, surplus: int) -> dict[str, Any]:
        """The sparsity of a layer where it is more than planned by `SPARSER`: zeros stay that were there before."""
        out, columns = layer.shape
        if surplus <= SPARSER * out * columns:
            return {}
        return {"sparser": {layer.name: (self.plan[layer.name].zeros(layer.shape) + surplus) / (out * columns)}}

    def prune_without_data(self, layer: Layer) -> dict[str, Any]:
        """Prune one layer in place by its weights alone; return what is to be said of it."""
        pruned = self.composition.prune(
            layer.weight, None, self.plan[layer.name], generator=self.generator(layer.name)
        )  # fmt: skip
        surplus = self.check_kept(layer, pruned)
        layer.write(pruned)
        return self.sparser(layer, surplus)

    def check_kept(self, layer: Layer, pruned: Any) -> int:
        """The zeros of a pruned weight (out, in) beyond its pattern's.

        **Raises** `SparsightError` for one that breaks the pattern or the method's `mask_only`.
        """
        W, pattern = layer.weight, self.plan[layer.name]
        fits = isinstance(pruned, torch.Tensor) and (pruned.shape, pruned.dtype) == (W.shape, W.dtype)
        surplus = pattern.surplus(pruned) if fits else None
        if surplus is None or not is_finite(pruned):
            raise SparsightError(
                f"{layer.name}: the method gave no finite {tuple(W.shape)} matrix of {W.dtype} that holds the pattern "
                f"{pattern}; put zeros where `pattern.keep(score)` is False"
            )
        changes = not self.composition.method.mask_only or self.composition.update
        if not changes and not are_same(pruned, W, mask_of(pruned)):
            raise SparsightError(f"{layer.name}: the method changed kept weights; declare it with mask_only=False")
        return surplus

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that depend on the seed and the name only."""
        return torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))


def output_error(X: torch.Tensor, W: torch.Tensor, pruned: torch.Tensor) -> float:
    """||X (pruned - W)^T|| / ||X W^T|| for inputs X (k, in) and weights (out, in).

    Products are float32, or bfloat16 where all three are, the device is fast at it, and the outputs are many: a fifth to an
    eighth of the time on a CPU with matrix tiles, and the ratio changes in the fourth digit or later.
    """
    narrow = X.dtype == W.dtype == pruned.dtype == torch.bfloat16 and len(X) * len(W) >= MANY
    if not (narrow and (X.is_cuda or has_tiles(X))):
        X, W, pruned = X.float(), W.float(), pruned.float()
    difference, reference = ((X @ change.T).float() for change in (pruned - W, W))
    return ratio(torch.linalg.norm(difference), torch.linalg.norm(reference))


def ratio(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """A relative error; 0 where there is nothing to compare with."""
    return float(difference / reference) if reference > 0 else 0.0
