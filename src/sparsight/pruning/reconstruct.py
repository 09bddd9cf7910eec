"""Block reconstruction: after a block is pruned its kept weights are fitted to the dense model's own outputs of the block.

The inputs come from the pruned blocks before it, the targets from a dense model that has not seen them, so that a block
repairs what earlier ones did, too (EBFT, arXiv 2402.12419): a few epochs of Adam over the calibration batches, the zeros
held. All pruned layers of a block are fitted together.

Memory: the block's inputs and dense outputs for all batches, and fp32 weights with Adam's two moments for one block. A block
whose error did not shrink keeps its weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsight.calibration.lockstep import Call
from sparsight.masks.matrix import mask_of
from sparsight.memory import give_back_memory
from sparsight.model.anatomy import Layer

RATE = 0.02  # Adam's step, in units of the root mean square of a layer's kept weights
LARGE = 2**22  # bytes of a layer in float32, from which on freed memory is given back in front of its step
Real = Callable[[int, torch.Tensor], torch.Tensor]  # (batch, (..., d)) -> (tokens, d) without padding


def first(output: Any) -> torch.Tensor:
    """Return a module's hidden states from its output, a tensor or a tuple that begins with it."""
    return output if isinstance(output, torch.Tensor) else output[0]


def reconstruct(
    layers: Sequence[Layer],
    calls: Mapping[int, Callable[[], Any]],
    targets: Mapping[int, torch.Tensor],
    real: Real,
    epochs: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Fit the kept weights of one block's `layers`, in place; return its relative output errors before and after.

    `calls` run the block on its inputs in the pruned model, `targets` are the dense model's outputs of it (..., d), both by
    batch. A larger error keeps the old weights. Cost: `epochs` forwards and backwards of the block per batch.
    """
    wish = {i: real(i, target) for i, target in targets.items() if i in calls}  # (tokens, d)
    scale = sum(float(t.float().square().sum()) for t in wish.values())
    order = [i for i, target in wish.items() if target.numel()]
    before = _error(calls, wish, real, scale)
    if not order or before == 0:
        return before, before
    start = [layer.weight.clone() for layer in layers]
    with _trainable(layers) as parameters:
        adam = _MaskedAdam(layers, start, epochs * len(order))
        for _ in range(epochs):
            for place in torch.randperm(len(order), generator=generator).tolist():
                i = order[place]
                with torch.enable_grad():
                    loss = (real(i, first(calls[i]())).float() - wish[i].float()).square().sum() * (len(order) / scale)
                    grads = dict(
                        zip(map(id, parameters), torch.autograd.grad(loss, parameters, allow_unused=True), strict=True)
                    )
                del loss
                adam.step(grads)
    after = _error(calls, wish, real, scale)
    if not after < before:
        for layer, W in zip(layers, start, strict=True):
            layer.write(W)
        return before, before
    return before, after


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


class _MaskedAdam:
    """Adam on float32 copies of the layers' weights, with a cosine schedule; what is zero in `start` stays zero."""

    def __init__(self, layers: Sequence[Layer], start: Sequence[torch.Tensor], steps: int) -> None:
        self.layers, self.start, self.steps, self.count = layers, start, steps, 0
        self.weights = [W.to(torch.float32, copy=True) for W in start]
        self.rates = [RATE * float(W[mask_of(W)].square().mean().sqrt()) if bool(W.any()) else 0.0 for W in self.weights]
        self.adam = torch.optim.Adam([{"params": [W]} for W in self.weights], betas=(0.9, 0.95))

    def step(self, grads: dict[int, Any]) -> None:
        """One step, a layer at a time, so that one gradient in float32 is there; `grads` is empty in the end."""
        last = {id(layer.parameter): layer for layer in self.layers}  # experts share a parameter
        cosine = 0.5 * (1 + math.cos(math.pi * self.count / self.steps))
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * cosine
        for layer, W, start in zip(self.layers, self.weights, self.start, strict=True):
            if W.nbytes >= LARGE:
                give_back_memory()  # activations, and what the layer before took: both are freed among what lives
            keep = mask_of(start)
            own = id(layer.parameter)
            grad = grads.pop(own) if last[own] is layer else grads[own]
            W.grad = _own(grad, layer).float().mul_(keep)
            del grad
            self.adam.step()  # of this layer: the others have no gradient
            W.grad = None
            layer.write(W.mul_(keep))
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
def _error(calls: Mapping, wish: Mapping[int, torch.Tensor], real: Real, scale: float) -> float:
    lost = sum(float((real(i, first(calls[i]())).float() - t.float()).square().sum()) for i, t in wish.items())
    return (lost / scale) ** 0.5 if scale else 0.0
