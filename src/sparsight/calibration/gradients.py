"""The gradient of the loss by every weight: the mean of dL/dW over calibration samples, and of its square.

L is the mean cross-entropy of the answer tokens of one sample, in float32 on the logits, so that nothing depends on how
samples are cut into batches. One backward pass per sample; a weight's gradient is added to the sums and then freed at once.
Memory: two float32 copies of the layers, and the activations of one sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sparsight.data.batching import one_by_one
from sparsight.data.encoding import Batch, select_answers
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Layer
from sparsight.model.load import overflow_advice


@dataclass(frozen=True)
class Gradient:
    """Means over samples, float32, on the layer's device."""

    mean: torch.Tensor  # (out, in) dL/dW
    square: torch.Tensor  # (out, in) (dL/dW)^2


def gradients(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]) -> dict[str, Gradient]:
    """Differentiate the loss by the weights of `layers`; the model does not change.

    Zero where the loss does not depend on a layer, as for an expert that no token reached. A batch of the user's own that
    cannot be cut counts as one sample.

    **Raises** `SparsightError` if a sample's loss is not finite.
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
            sums[layer.name].mean.add_(g)
            sums[layer.name].square.addcmul_(g, g)

    count = 0
    with evaluating(model), _leaves(model, owned), torch.enable_grad():
        hooks = [parameter.register_post_accumulate_grad_hook(add) for parameter in owned]
        try:
            for sample in answered(batches):
                count += 1
                loss = answer_loss(model, sample)
                if not torch.isfinite(loss):
                    advice = overflow_advice(model, "check the samples")
                    raise SparsightError(f"`data`: the loss of a calibration sample is NaN or infinite; {advice}")
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    return {name: Gradient(sum_.mean.div_(count), sum_.square.div_(count)) for name, sum_ in sums.items()}


def answered(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The samples of batches one by one, those without an answer left out."""
    for batch in batches:
        for sample in one_by_one(batch):
            if bool((sample.inputs["labels"][:, int(sample.shifted) :] != -100).any()):
                yield sample


def answer_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy of a batch's answer tokens, in float32, with its graph."""
    logits, targets = answer_logits(model, batch)
    return F.cross_entropy(logits.float(), targets)


def answer_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (n, V) that predict the answer tokens of a batch, and these tokens (n,).

    Labels on the input tokens are not given to the model, which would compute its own loss over every position.
    """
    inputs = {key: value for key, value in batch.inputs.items() if key != "labels" or not batch.shifted}
    return select_answers(model(**inputs).logits, batch.inputs["labels"], batch.shifted)


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
