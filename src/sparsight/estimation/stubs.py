"""Replacements of parts of a model that a trace cannot run, or that a CPU runs as one kernel.

* attention: the fused kernel; the scores never exist as a whole, and saved are q, k, v, the output and one float32 per row
  and head;
* an adapted layer: the compiled kernels of `restore`; saved are x and the packed mask, and an effective weight of W's
  size and dtype lives only while its product is taken;
* fused experts: the routing depends on the weights, so here all experts get equally many tokens. With adapters autograd
  keeps their effective weights until backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

META = torch.device("meta")


class Counter(Protocol):
    """A count of FLOPs."""

    flops: int


def to_meta(x: Any) -> Any:
    """A tensor with dimensions on the meta device; anything else as it is."""
    return x.to(META) if isinstance(x, torch.Tensor) and not x.is_meta and x.dim() > 0 else x


class _Attention(torch.autograd.Function):
    """Fused attention: scores never exist as a whole, and backward makes them again."""

    @staticmethod
    def forward(ctx, q, k, v):  # (B, H, T, d)
        out, lse = torch.empty_like(q[..., : v.shape[-1]]), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class FusedAttention(TorchFunctionMode):
    """Puts fused attention in the place of torch's."""

    def __init__(self, ledger: Counter) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (to_meta(x) for x in args[:3]) if len(args) >= 3 else (kwargs[x] for x in ("query", "key", "value"))
        work = 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        self.ledger.flops += work
        out = _Attention.apply(q, k, v)
        if out.requires_grad:  # scores once more, and the gradients of scores, q, k and v
            out.register_hook(lambda grad: setattr(self.ledger, "flops", self.ledger.flops + work * 5 // 2))
        return out


class _Adapted(torch.autograd.Function):
    """x E^T + b with E made anew in both directions, as `restoring/peft_layers.py` does."""

    @staticmethod
    def forward(ctx, x, W, bias, packed, ledger, *factors):
        ctx.save_for_backward(x, W, packed, *factors)
        ctx.ledger, ctx.made = ledger, sum(2 * f.shape[-1] * W.numel() for f in factors[1:])
        ledger.flops += ctx.made
        return F.linear(x, torch.empty_like(W), bias)

    @staticmethod
    def backward(ctx, grad):
        x, W, _, *factors = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            ctx.ledger.flops += ctx.made
            dx = grad @ torch.empty_like(W)
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if factors:
            dE = g.T @ flat
            ctx.ledger.flops += 2 * ctx.made
            del dE
        return dx, None, None, None, None, *(torch.empty_like(f) for f in factors)


class _AdaptedWeight(torch.autograd.Function):
    """The effective weights of fused experts, which autograd keeps until backward."""

    @staticmethod
    def forward(ctx, W, ledger, *factors):
        ctx.save_for_backward(W, *factors)
        ctx.ledger, ctx.made = ledger, sum(2 * f.shape[-1] * W.numel() for f in factors[1:])
        ledger.flops += ctx.made
        return torch.empty_like(W)

    @staticmethod
    def backward(ctx, grad):
        _, *factors = ctx.saved_tensors
        ctx.ledger.flops += 2 * ctx.made
        return None, None, *(torch.empty_like(f) for f in factors)


FactorShapes = Callable[[int, int, int], tuple[tuple[int, ...], ...]]  # (out, in, rank) -> the shapes of what is trained


def adapt(module: nn.Module, rank: int, ledger: Counter, shapes: FactorShapes, *, masked: bool = True) -> int:
    """Replace the forward of a linear module, or of fused experts, in place; the number of trained parameters.

    Rank 0 trains nothing and only masks.
    """
    with torch.device(META):
        if isinstance(module, nn.Linear):
            W = module.weight
            factors = _factors(W, rank, shapes)
            packed = torch.empty((W.numel() + 7) // 8, dtype=torch.uint8) if masked else None
            plain = module.bias
            module.forward = lambda input: _Adapted.apply(input, W, plain, packed, ledger, *factors)  # type: ignore[method-assign]
            return sum(f.numel() for f in factors)
        own = {name: _factors(p, rank, shapes) for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
        weights = {name: cast(torch.Tensor, getattr(module, name)) for name in own}
        forward = even(module)

        def forward_adapted(*args: Any) -> Any:
            return forward(*args, **{n: _AdaptedWeight.apply(W, ledger, *own[n]) for n, W in weights.items()})

        module.forward = forward_adapted
        return sum(f.numel() for factors in own.values() for f in factors)


def _factors(W: torch.Tensor, rank: int, shapes: FactorShapes) -> list[nn.Parameter]:
    *experts, out, columns = W.shape
    return [nn.Parameter(torch.empty(*experts, *shape)) for shape in (shapes(out, columns, rank) if rank else ())]


def even(module: nn.Module) -> Callable[..., torch.Tensor]:
    """The forward of fused experts with the tokens divided evenly: the real routing depends on the weights."""

    def forward(X: torch.Tensor, places: torch.Tensor, share: torch.Tensor, **weights: torch.Tensor) -> torch.Tensor:
        up, down = (weights.get(name, getattr(module, name)) for name in ("gate_up_proj", "down_proj"))
        rows = X.shape[0] * places.shape[-1]
        count = min(len(up), rows)
        total = torch.zeros_like(X)
        for i in range(count):
            here = torch.arange(rows // count + (i < rows % count)) % X.shape[0]
            inner = module._apply_gate(F.linear(X[here], up[i]))  # type: ignore[operator]
            total.index_add_(0, here.to(META), F.linear(inner, down[i]) * share[here, :1])
        return total

    return forward


def hollow(config: Any, dtype: torch.dtype) -> Any:
    """The model of a configuration, in eval mode, without weights."""
    from transformers import AutoModelForMultimodalLM

    with torch.device(META):
        model = AutoModelForMultimodalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "_apply_gate"):
            module.forward = even(module)
    return model
