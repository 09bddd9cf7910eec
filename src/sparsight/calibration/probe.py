"""Measurements of a model on calibration batches, for policies: each is made once and cached.

The model does not change: a weight that is changed for a measurement gets its own bits back.
"""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sparsight.calibration.gradients import Gradient, answer_logits, answer_loss, answered, evaluating, gradients
from sparsight.calibration.lockstep import lockstep
from sparsight.calibration.observe import Watch
from sparsight.data.encoding import Batch
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, Layer

FEW = 32  # samples, for what costs many forward passes


class Probe:
    """A model, taken apart, and the calibration batches to measure it on; the same seed gives the same numbers.

    Long measurements call `progress(note, done, total)`.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        batches: Sequence[Batch],
        seed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        if not batches:
            raise SparsightError("`data`: there is no calibration sample to measure on; give at least one")
        self.model, self.anatomy, self.batches, self.seed = model, anatomy, batches, seed
        self.progress = progress or (lambda note, done, total: None)
        self._cache: dict[tuple, Any] = {}

    def once(self, key: tuple, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, which is called once per key."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    @property
    def few_samples(self) -> list[Batch]:
        """The first `FEW` samples as batches of one, whatever the batch size."""
        return self.once(("few samples",), lambda: list(itertools.islice(answered(self.batches), FEW)))

    @property
    def few(self) -> list[Batch]:
        """As many batches as it takes to have `FEW` samples."""
        taken, samples = [], 0
        for batch in self.batches:
            if samples >= FEW:
                break
            taken.append(batch)
            samples += batch.rows
        return taken

    def norms(self, layers: Sequence[Layer] | None = None) -> dict[str, torch.Tensor]:  # {layer: (in,)}
        """||x_j||_2 of the layers' inputs (by default of all) over all real tokens, in the dense model: one walk for all.

        All zeros for a layer that no token reached; `SparsightError` where none reached any layer of its component.
        """
        every = self.once(("norms",), self._walk)
        reached = {layer.component for layer in self.anatomy.layers if layer.name in every}
        norms = {}
        for layer in self.anatomy.layers if layers is None else layers:
            if layer.component not in reached:
                raise SparsightError(
                    f"{layer.name}: no calibration sample reached this layer, nor any other of {layer.component}; give "
                    "samples that use it, or `ignore` it"
                )
            nothing = torch.zeros(layer.shape[1], device=layer.weight.device)
            norms[layer.name] = every.get(layer.name, nothing)
        return norms

    def _walk(self) -> dict[str, torch.Tensor]:
        norms: dict[str, torch.Tensor] = {}
        blocks = [(block.name, block.module) for block in self.anatomy.blocks_with({x.name for x in self.anatomy.layers})]

        def visit(name: str, block: nn.Module, calls: Mapping[int, Any]) -> None:
            watch = Watch([layer for layer in self.anatomy.layers if layer.block == name], len(calls))
            with watch.open():
                for i, call in calls.items():
                    with watch.during(self.batches[i].padding):
                        call()
            norms.update({layer: moments.norm for layer, moments in watch.moments.items()})

        with evaluating(self.model):
            lockstep(self.model, blocks, [batch.inputs for batch in self.batches], visit)
        return norms

    def slopes(self, layers: Sequence[Layer], eps: float = 1e-3) -> dict[str, float]:
        """`|L(W + eps z) - L(W - eps z)| / 2 eps` per layer, z Gaussian, new for every sample; the mean over `FEW` samples.

        Cost: two forward passes per layer and sample.
        """
        slopes = {}
        for done, layer in enumerate(layers):
            slopes[layer.name] = self.once(("slope", layer.name, eps), partial(self._slope, layer, eps))
            self.progress(f"slope of {layer.name}", done + 1, len(layers))
        return slopes

    def _slope(self, layer: Layer, eps: float) -> float:
        W, total, alone = layer.weight.float(), 0.0, self.few_samples
        for i, sample in enumerate(alone):
            z, loss = self.noise(layer, i).to(W.device), []
            for sign in (1, -1):
                with self.changed({layer.name: W + sign * eps * z}), evaluating(self.model), torch.no_grad():
                    loss.append(float(answer_loss(self.model, sample)))
            total += abs(loss[0] - loss[1]) / (2 * eps)
        return total / len(alone)

    def noise(self, layer: Layer, i: int) -> torch.Tensor:  # (out, in)
        """Gaussian numbers that depend on the seed, the layer's name and the sample's place only."""
        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(f"{layer.name} {i}".encode()))
        return torch.randn(layer.shape, generator=generator)

    def gradients(self, layers: Sequence[Layer]) -> dict[str, Gradient]:
        """The gradient of the loss by the weights of these layers; see `gradients.py`."""
        self._check_whole(layers)
        names = tuple(layer.name for layer in layers)
        return self.once(("gradients", *names), lambda: gradients(self.model, layers, self.batches))

    def divergence(self, weights: Mapping[str, torch.Tensor]) -> float:
        """KL(dense || changed) of the next token, where the layers named have these weights (out, in).

        The mean over the answer tokens of `few` batches; one forward pass of each.
        """
        dense = self.once(("few answers",), lambda: self._answers(self.few))
        with self.changed(weights):
            return _divergence(dense, self._answers(self.few))

    def dense_answers(self) -> list[torch.Tensor]:  # (n, V) per batch
        """The reference of `drift`: log-probabilities at the answer tokens, of the model at the first call."""
        return self.once(("answers",), lambda: self._answers(self.batches))

    def drift(self) -> float:
        """KL(now || dense) of the next token.

        The mean over the answer tokens of all batches; `dense_answers` must have been called before the model was changed.
        """
        return _divergence(self._answers(self.batches), self.dense_answers())

    @torch.no_grad()
    def _answers(self, batches: Sequence[Batch]) -> list[torch.Tensor]:  # (n, V) per batch
        """Log-probabilities at the answer tokens."""
        answers = []
        with evaluating(self.model):
            for batch in batches:
                chunk, _ = answer_logits(self.model, batch)
                answers.append(F.log_softmax(chunk.float(), dim=-1))
        return answers

    @contextlib.contextmanager
    def changed(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Put other weights (out, in) into layers inside the block; the layers get their own bits back after it."""
        layers = [self.anatomy[name] for name in weights]
        self._check_whole(layers)
        before = [layer.weight.clone() for layer in layers]
        try:
            for layer in layers:
                layer.write(weights[layer.name])
            yield
        finally:
            for layer, W in zip(layers, before, strict=True):
                layer.write(W)

    def _check_whole(self, layers: Sequence[Layer]) -> None:
        """**Raises** `SparsightError` for a model that is in memory block by block, where a change would be lost."""
        if any(layer.bring for layer in layers):
            raise SparsightError("`policy`: changes weights, or takes gradients, to measure; declare it with `whole=True`")


def _divergence(p: Sequence[torch.Tensor], q: Sequence[torch.Tensor]) -> float:
    """KL(p || q) of log-probabilities (n, V) per batch, mean over all n."""
    total = sum(float(F.kl_div(b, a, reduction="sum", log_target=True)) for a, b in zip(p, q, strict=True))
    return total / sum(len(a) for a in p)
