"""Which modules are linear maps, and how stacks of experts lie in their parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

UP = ("gate_up_proj", "up_proj", "gate_proj")  # names of the tensors that a stack of experts multiplies its inputs with
DOWN = "down_proj"


@dataclass(frozen=True)
class Stack:
    """How the tensors of a module with fused experts lie.

    `keys` are in forward order. `transposed`: (experts, in, out) instead of (experts, out, in). `routed`: the module gets
    all tokens and the experts of each, as transformers' fused experts do; else every expert's inputs are multiplied by
    `torch.bmm`.
    """

    keys: tuple[str, ...]
    transposed: bool
    routed: bool


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with one weight matrix; `Conv1D` of transformers has it transposed."""
    return isinstance(module, nn.Linear | Conv1D)


def read_elsewhere(module: nn.Module) -> bool:
    """Whether another module reads this one's weight: the output map of `nn.MultiheadAttention` is never called."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def output_head(model: nn.Module) -> nn.Module | None:
    """The output head: the model's own, or that of the first model inside it that has one; None without one."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            try:
                head = module.get_output_embeddings()
            except (AttributeError, NotImplementedError):
                continue
            if head is not None:
                return head
    return None


def holds_matrices(module: nn.Module) -> bool:
    """Whether a module holds a linear map or a stack of experts."""
    return any(is_linear(inner) or stack_of(inner) is not None for inner in module.modules())


def stack_of(module: nn.Module) -> Stack | None:
    """The layout of a module with fused experts; None for any other module."""
    tensors = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    first = next((tensors[name] for name in UP if name in tensors), None)
    down = tensors.get(DOWN)
    if first is None or down is None or len({len(p) for p in tensors.values()}) != 1:
        return None
    straight, transposed = first.shape[2] == down.shape[1], first.shape[1] == down.shape[2]
    if not straight and not transposed:
        return None
    if straight and transposed:  # by the shapes it may be both; (experts, out, in) is transformers' default
        transposed = bool(getattr(module, "is_transposed", False))
    keys = tuple(name for name in (*UP, DOWN) if name in tensors)
    return Stack(keys, transposed, hasattr(module, "_apply_gate"))


def expert_product(module: nn.Module, stack: Stack, key: str, index: int, X: torch.Tensor) -> torch.Tensor:
    """The product of inputs X (tokens, in) with one expert's matrix, with its bias."""
    W = getattr(module, key)[index]
    bias = module._parameters.get(f"{key}_bias")
    Y = X @ W if stack.transposed else X @ W.T
    return Y if bias is None else Y + bias[index]
