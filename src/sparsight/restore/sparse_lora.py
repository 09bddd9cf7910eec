"""SparseLoRA: y = x ((W + s B A) * M)^T + b, trained and merged as the very same bits.

The mask M is fixed and packed, one bit per weight. The effective weight is one float32 expression, rounded once to W's
dtype; forward, backward and merge all call the same function, so what was trained is what is saved. The backward keeps
x, A, B and the packed mask, and makes the effective weight anew: nothing of W's size is stored between the two passes.

The gradient is exact: dA and dB see only the kept weights. (The two-product shortcut of LoRS drops the mask there.)
Method: He et al., arXiv 2404.02424; the published code keeps a full effective weight per layer for autograd.

Built on stock PEFT through one private seam, `LoraConfig._register_custom_module`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from sparsight.errors import SparsightError
from sparsight.model.masks import unpack

ADAPTER = "default"


def effective_weight(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, packed: torch.Tensor
) -> torch.Tensor:
    """Compute (W + s B A) * M in float32 (float64 for float64 weights), rounded once to W's dtype.

    W (out, in), A (r, in), B (out, r), `packed` the mask of W in bits. Where the mask is 0 the result is +0.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    E = torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=scaling)  # (out, in)
    return E.masked_fill_(~unpack(packed, W.shape), 0).to(W.dtype)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scaling, packed):
        ctx.save_for_backward(x, W, A, B, packed)
        ctx.scaling, ctx.with_bias = scaling, bias is not None
        return F.linear(x, effective_weight(W, A, B, scaling, packed), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # grad (..., out)
        x, W, A, B, packed = ctx.saved_tensors
        dx = dA = dB = db = None
        if ctx.needs_input_grad[0]:
            dx = grad @ effective_weight(W, A, B, ctx.scaling, packed)
        g = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            dE = (g.T @ x.reshape(-1, x.shape[-1])).to(torch.promote_types(A.dtype, W.dtype))  # (out, in)
            dE.masked_fill_(~unpack(packed, W.shape), 0).mul_(ctx.scaling)
            dA = (B.T.to(dE.dtype) @ dE).to(A.dtype)
            dB = (dE @ A.T.to(dE.dtype)).to(B.dtype)
        if ctx.with_bias and ctx.needs_input_grad[2]:
            db = g.sum(0)
        return dx, None, db, dA, dB, None, None


def sparse_linear(
    x: torch.Tensor,
    W: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    packed: torch.Tensor,
) -> torch.Tensor:
    """Apply the masked adapted linear map to x (..., in); W is frozen and gets no gradient.

    Three products of W's size per training step where plain LoRA needs two. Bytes saved for backward beyond x, A and B:
    one bit per weight. Autocast does not reach inside: x is cast to W's dtype, as the merged layer would see it.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _SparseLinear.apply(x.to(W.dtype), W, bias, A, B, scaling, packed)


class SparseLoraLinear(LoraLinear):
    """A PEFT LoRA layer whose product is masked. With the adapter disabled it is the base layer, untouched."""

    keep: torch.Tensor  # the packed mask of the weight

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, *, keep: torch.Tensor, **kw: Any):
        if config.lora_dropout:
            raise SparsightError(
                f"lora_dropout={config.lora_dropout:g}: SparseLoRA takes no dropout, which would train the dense product "
                "B A x instead of the masked weight; set it to 0"
            )
        if config.use_dora or config.lora_bias or config.fan_in_fan_out:
            raise SparsightError("use_dora, lora_bias and fan_in_fan_out do not go with SparseLoRA; leave them off")
        super().__init__(base_layer, adapter_name, config=config, **kw)
        self.register_buffer("keep", keep, persistent=False)
        self._unmerged: torch.Tensor | None = None

    def _base(self) -> nn.Linear:
        return cast(nn.Linear, self.get_base_layer())

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r)."""
        return cast(nn.Linear, self.lora_A[adapter]).weight, cast(nn.Linear, self.lora_B[adapter]).weight

    def effective(self, adapter: str = ADAPTER) -> torch.Tensor:
        """The weight (out, in) that forward uses and merge writes."""
        A, B = self._factors(adapter)
        return effective_weight(self._base().weight, A, B, self.scaling[adapter], self.keep)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            if self.merged and self.disable_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        adapter = self.active_adapters[0]
        A, B = self._factors(adapter)
        base = self._base()
        return sparse_linear(x, base.weight, base.bias, A, B, self.scaling[adapter], self.keep)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging adds to the base weight, (out, in), in float32."""
        return self.effective(adapter).float() - self._base().weight.float()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the effective weight in place of the base weight; the base weight is kept for `unmerge`."""
        if self.merged:
            raise ValueError("the adapter is merged already; unmerge it first")
        base = self._base()
        merged = self.effective((adapter_names or self.active_adapters)[0])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError("NaN or infinity in the merged weights; the adapter is broken")
        self._unmerged, base.weight.data = base.weight.data, merged
        self.merged_adapters.append((adapter_names or self.active_adapters)[0])

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if self._unmerged is not None:
            self._base().weight.data, self._unmerged = self._unmerged, None
            self.merged_adapters.clear()


def add_adapters(
    model: nn.Module,
    layers: Mapping[str, tuple[int, torch.Tensor | None]],
    *,
    alpha: float = 16,
    seed: int = 0,
) -> Any:
    """Wrap `model` in PEFT, in place: `layers` gives each layer's rank and packed mask.

    A layer with a mask gets SparseLoRA, one without (None) plain LoRA. A starts kaiming-uniform, B at zero, both
    float32; everything else is frozen. Returns the `PeftModel`.
    """
    masks = {id(model.get_submodule(name)): keep for name, (_, keep) in layers.items()}

    def place(target: nn.Module, adapter_name: str, **kwargs: Any) -> LoraLinear:
        keep = masks[id(target)]
        if type(target) is not nn.Linear:
            raise SparsightError(
                f"a layer is {type(target).__name__} and not a plain linear layer (a quantized base?); "
                "load the model in float32, bfloat16 or float16"
            )
        if keep is None:
            return LoraLinear(target, adapter_name, **kwargs)
        return SparseLoraLinear(target, adapter_name, keep=keep, **kwargs)

    ranks: dict[int, list[str]] = {}
    for name, (rank, _) in layers.items():
        ranks.setdefault(rank, []).append(re.escape(name))
    groups = {rank: "(?:" + "|".join(names) + ")" for rank, names in ranks.items()}
    config = LoraConfig(
        r=max(groups),
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules="|".join(groups.values()),
        rank_pattern={f"^{names}$": rank for rank, names in groups.items()},
        bias="none",
    )
    config._register_custom_module({nn.Linear: place})  # type: ignore[dict-item]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by an older name whether activations are checkpointed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers of a wrapped model, by the name of the layer they wrap."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLinear)}
