"""The gradient of the loss by every weight: the mean of dL/dW over calibration batches, and of its square.

L is the cross-entropy of the answer tokens of a batch, in float32 on the logits. One backward pass per batch; a weight's
gradient is added to the sums and then freed at once. Memory: two float32 copies of the layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sparsight.data.encoding import Batch, select_answers
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Layer
from sparsight.model.load import overflow_advice


@dataclass(frozen=True)
class Gradient:
    """Means over batches, float32, on the layer's device."""

    mean: torch.Tensor  # (out, in) dL/dW
    square: torch.Tensor  # (out, in) (dL/dW)^2


def gradients(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]) -> dict[str, Gradient]:
    """Differentiate the loss by the weights of `layers`; the model does not change.

    Zero where the loss does not depend on a layer, as for an expert that no token reached.

    **Raises** `SparsightError` if a batch's loss is not finite.
    """
    sums = {
        layer.name: Gradient(*(torch.zeros(layer.shape, dtype=torch.float32, device=layer.weight.device) for _ in "12"))
        for layer in layers
    }
    owned: dict[nn.Parameter, list[Layer]] = {}
    for layer in layers:
        owned.setdefault(layer.parameter, []).append(layer)

    def add(parameter: torch.Tensor) -> None:
        whole, parameter.grad = parameter.grad, None
        if whole is None:
            return
        for layer in owned[parameter]:  # type: ignore[index]
            g = layer.part_of(whole).float()
            sums[layer.name].mean.add_(g, alpha=1 / len(batches))
            sums[layer.name].square.addcmul_(g, g, value=1 / len(batches))

    with evaluating(model), _leaves(model, owned), torch.enable_grad():
        hooks = [parameter.register_post_accumulate_grad_hook(add) for parameter in owned]
        try:
            for batch in batches:
                loss = answer_loss(model, batch)
                if not torch.isfinite(loss):
                    advice = overflow_advice(model, "check the samples")
                    raise SparsightError(f"`data`: the loss of a calibration batch is NaN or infinite; {advice}")
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    return sums


def answer_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy of a batch's answer tokens, in float32, with its graph."""
    logits, targets = select_answers(model(**batch.inputs).logits, batch.inputs["labels"], batch.shifted)
    return F.cross_entropy(logits.float(), targets)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside the block, and its modules back into train mode after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _leaves(model: nn.Module, leaves: dict[nn.Parameter, list[Layer]]) -> Iterator[None]:
    """Require gradients of these parameters only, and restore every `requires_grad` and `.grad` after the block."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(parameter in leaves)
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
