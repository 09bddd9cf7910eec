"""Block reconstruction: after a block is pruned its kept weights are fitted to the dense block's outputs.

Attention and MLP are fitted apart and in forward order, each to the dense outputs of its own module, on its inputs in the
pruned model (the finding of "A Free Lunch in LLM Compression", arXiv 2510.14444; whole blocks: EBFT, arXiv 2402.12419):
a few epochs of Adam over the calibration batches, the zeros held. Layers with the same parent
module are one part; layers directly in the block are fitted to the block's output.

Memory: the inputs and outputs of one block's parts for all batches, and fp32 weights with Adam's two moments for one
part. A part whose error did not shrink keeps its weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsight.calibration.lockstep import Call
from sparsight.model.anatomy import Layer

RATE = 0.02  # Adam's step, in units of the root mean square of a layer's kept weights
Real = Callable[[int, torch.Tensor], torch.Tensor]  # (batch, (..., d)) -> (tokens, d) without padding


class Reconstruction:
    """Fit one block's `layers` in place. `watch` while the dense block runs, then prune, then `fit`."""

    def __init__(self, name: str, block: nn.Module, layers: Sequence[Layer], calls: Mapping[int, Call], real: Real) -> None:
        self.block, self.calls, self.real = block, calls, real
        self.parts: dict[nn.Module, list[Layer]] = {}
        for layer in layers:
            self.parts.setdefault(parent(name, block, layer), []).append(layer)
        self.targets: dict[nn.Module, dict[int, torch.Tensor]] = {part: {} for part in self.parts}

    @contextlib.contextmanager
    def watch(self, i: int) -> Iterator[None]:
        """Keep the parts' outputs while the dense block runs batch `i` inside the `with`."""

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            self.targets[module][i] = self.real(i, first(output)).clone()

        hooks = [part.register_forward_hook(keep) for part in self.parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def fit(self, epochs: int, generator: torch.Generator) -> dict[str, tuple[float, float]]:
        """Fit all parts in place; return relative output errors before and after, by the name of a part's first layer.

        Cost: `epochs` forwards and backwards of the block per batch. A part with a larger error keeps its old weights.
        """
        errors = {}
        for part, layers in self.parts.items():
            runs = {i: self._run(part, i) for i in self.targets[part]}
            errors[layers[0].name] = _fit(part, layers, runs, self.targets[part], self.real, epochs, generator)
        return errors

    def _run(self, part: nn.Module, i: int) -> Callable[[], Any]:
        """Return a call of the part with its present inputs of batch `i`."""
        if part is self.block:
            return self.calls[i]
        args, kwargs = inputs_of(part, self.calls[i])
        return lambda: part(*args, **kwargs)


class _Caught(Exception):
    pass


def inputs_of(part: nn.Module, call: Call) -> tuple[tuple, dict]:
    """Return the (args, kwargs) of a module inside a block's call, which stops there."""
    if part is call.func:
        return call.args, call.keywords
    inputs: list[tuple[tuple, dict]] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append((args, kwargs))
        raise _Caught

    hook = part.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with contextlib.suppress(_Caught):
            call()
    finally:
        hook.remove()
    return inputs[0]


def parent(name: str, block: nn.Module, layer: Layer) -> nn.Module:
    """Return the module inside the block that holds the layer, or the block itself."""
    if layer.expert is not None:
        return layer.module
    inner = layer.name.removeprefix(name).strip(".").rpartition(".")[0]
    return block.get_submodule(inner) if inner else block


def first(output: Any) -> torch.Tensor:
    """Return a module's hidden states from its output, a tensor or a tuple that begins with it."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _fit(
    part: nn.Module,
    layers: Sequence[Layer],
    runs: Mapping[int, Callable[[], Any]],
    targets: Mapping[int, torch.Tensor],
    real: Real,
    epochs: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Fit one part in place; return its relative output errors before and after."""
    scale = sum(float(t.float().square().sum()) for t in targets.values())
    order = [i for i in runs if targets[i].numel()]
    before = _error(runs, targets, real, scale)
    if not order or before == 0:
        return before, before
    start = [layer.weight.clone() for layer in layers]
    with _trainable(layers) as parameters:
        adam = _MaskedAdam(layers, epochs * len(order))
        for _ in range(epochs):
            for place in torch.randperm(len(order), generator=generator).tolist():
                i = order[place]
                with torch.enable_grad():
                    loss = (real(i, first(runs[i]())).float() - targets[i].float()).square().sum() * (len(order) / scale)
                    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                adam.step({id(p): grad for p, grad in zip(parameters, grads, strict=True)})
    after = _error(runs, targets, real, scale)
    if not after < before:
        for layer, W in zip(layers, start, strict=True):
            layer.write(W)
        return before, before
    return before, after


class _MaskedAdam:
    """Adam on float32 copies of the layers' weights, with a cosine schedule; the zeros stay."""

    def __init__(self, layers: Sequence[Layer], steps: int) -> None:
        self.layers, self.steps, self.count = layers, steps, 0
        self.weights = [layer.weight.float().clone() for layer in layers]
        self.keeps = [W != 0 for W in self.weights]
        self.rates = [
            RATE * float(W[keep].square().mean().sqrt()) if bool(keep.any()) else 0.0
            for W, keep in zip(self.weights, self.keeps, strict=True)
        ]
        self.adam = torch.optim.Adam([{"params": [W]} for W in self.weights], betas=(0.9, 0.95))

    def step(self, grads: Mapping[int, torch.Tensor | None]) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * self.count / self.steps))
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * cosine
        for layer, W, keep in zip(self.layers, self.weights, self.keeps, strict=True):
            W.grad = _own(grads[id(layer.parameter)], layer).float() * keep
        self.adam.step()
        for layer, W, keep in zip(self.layers, self.weights, self.keeps, strict=True):
            layer.write(W * keep)
        self.count += 1


def _own(grad: torch.Tensor | None, layer: Layer) -> torch.Tensor:
    """Return the layer's part of its parameter's gradient; zeros if there is none."""
    if grad is None:
        return torch.zeros_like(layer.weight)
    return layer.part_of(grad)


@contextlib.contextmanager
def _trainable(layers: Sequence[Layer]) -> Iterator[list[nn.Parameter]]:
    """Turn on `requires_grad` of the layers' parameters inside the block; yields the parameters."""
    parameters = list({id(layer.parameter): layer.parameter for layer in layers}.values())
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield parameters
    finally:
        for p, needs_grad in zip(parameters, before, strict=True):
            p.requires_grad_(needs_grad)


@torch.no_grad()
def _error(runs: Mapping, targets: Mapping[int, torch.Tensor], real: Real, scale: float) -> float:
    lost = sum(float((real(i, first(run())).float() - targets[i].float()).square().sum()) for i, run in runs.items())
    return (lost / scale) ** 0.5 if scale else 0.0
