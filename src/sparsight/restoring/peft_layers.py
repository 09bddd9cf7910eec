"""SparseLoRA: y = x ((W + s B A) * M)^T + b, trained and merged as the very same bits; other adapters, the same way.

The mask M is fixed and packed, one bit per weight. The effective weight is computed anew in forward, backward and merge
(`adapters/`): nothing of W's size is stored between the two passes. The gradient is exact: the factors see the kept
weights only. Three products of W's size per training step where plain LoRA needs two.
Method: He et al., arXiv 2404.02424; the published code keeps a full effective weight per layer for autograd.

Built on stock PEFT through one private seam, `LoraConfig._register_custom_module`.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from sparsight.errors import SparsightError
from sparsight.masks.bits import pack
from sparsight.masks.matrix import is_finite
from sparsight.model.anatomy import Layer
from sparsight.model.matrices import stack_of
from sparsight.restoring.adapters import ADAPTERS, Factors, effective, project

ADAPTER = "default"  # PEFT's name of the one adapter


class _Product(torch.autograd.Function):
    """x E^T + b. Saved for backward: x, the factors and the packed mask; W is there anyway."""

    @staticmethod
    def forward(ctx, x, W, bias, packed, scaling, adapter, *factors):
        ctx.save_for_backward(x, W, packed, *factors)
        ctx.scaling, ctx.adapter, ctx.with_bias = scaling, adapter, bias is not None
        return F.linear(x, effective(adapter, W, factors, scaling, packed).to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # grad (..., out)
        x, W, packed, *factors = ctx.saved_tensors
        adapter, scaling = ctx.adapter, ctx.scaling
        dx, db = None, None
        gradients: tuple[torch.Tensor | None, ...] = (None,) * len(factors)
        if ctx.needs_input_grad[0]:
            dx = grad @ effective(adapter, W, tuple(factors), scaling, packed).to(grad.dtype)
        g = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        if any(ctx.needs_input_grad[6:]):
            flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
            if (shortcut := ADAPTERS[adapter].shortcut) is not None:
                gradients = shortcut(g, flat, tuple(factors), scaling)
            else:
                gradients = project(adapter, g.T @ flat, W, tuple(factors), scaling, packed)
        if ctx.with_bias and ctx.needs_input_grad[2]:
            db = g.sum(0)
        return dx, None, db, None, None, None, *gradients


class _Weight(torch.autograd.Function):
    """The effective weights (experts, out, in) of fused experts, for a module that computes its own products."""

    @staticmethod
    def forward(ctx, W, packed, scaling, adapter, *factors):  # W (experts, out, in)
        ctx.save_for_backward(W, packed, *factors)
        ctx.scaling, ctx.adapter = scaling, adapter
        each = zip(W, packed, *factors, strict=True)
        return torch.stack([effective(adapter, w, tuple(own), scaling, bits) for w, bits, *own in each])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # grad (experts, out, in)
        W, packed, *factors = ctx.saved_tensors
        each = zip(grad, W, packed, *factors, strict=True)
        gradients = [project(ctx.adapter, dE, w, tuple(own), ctx.scaling, bits) for dE, w, bits, *own in each]
        return None, None, None, None, *(torch.stack(grads) for grads in zip(*gradients, strict=True))


def sparse_linear(
    x: torch.Tensor,
    W: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Factors,
    scaling: float,
    packed: torch.Tensor | None,
    adapter: str = "sparselora",
) -> torch.Tensor:
    """Apply the masked adapted linear map to x (..., in); W is frozen and gets no gradient.

    Bytes saved for backward beyond x and the factors: one bit per weight. x is cast to W's dtype, or under autocast both
    are cast to autocast's, as the merged layer would do.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else W.dtype
    with torch.autocast(kind, enabled=False):
        b = None if bias is None else bias.to(dtype)
        return _Product.apply(x.to(dtype), W, b, packed, scaling, adapter, *factors)


class MaskedTuner(nn.Module, BaseTunerLayer):
    """What wraps a pruned module: its masks, the factors that are trained, and the one adapter they make up.

    With the adapter disabled it is the base layer, untouched. Parameters are named `lora_...`, so that PEFT trains them.
    """

    def __init__(self, base_layer: nn.Module, adapter: str, alpha: float, rank: int) -> None:
        super().__init__()
        self.base_layer, self.kind, self.rank = base_layer, adapter, rank
        self.scaling = alpha / rank
        self.adapter_layer_names = tuple(f"lora_{name}" for name in ADAPTERS[adapter].names)
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, [ADAPTER], []
        self._unmerged: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        """What the wrapper does not have is the base layer's: a model may read `in_features` of its layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapter on or off."""
        self._disable_adapters = not enabled

    def effective(self) -> dict[str, torch.Tensor]:
        """The weights that forward uses and merge writes, by the parameter of the base layer that they replace."""
        raise NotImplementedError

    def forward_adapted(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with the effective weights."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted forward; that of the base layer where the adapter is merged or off."""
        if self.merged and self.disable_adapters:
            self.unmerge()
        if self.merged or self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        return self.forward_adapted(*args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the effective weights in place of the base weights. **Raises** `ValueError` if merged already, or for NaN."""
        if self.merged:
            raise ValueError("the adapter is merged already; unmerge it first")
        merged = self.effective()
        if safe_merge and not all(is_finite(E) for E in merged.values()):
            raise ValueError("NaN or infinity in the merged weights; the adapter is broken")
        for name, E in merged.items():
            parameter = getattr(self.base_layer, name)
            self._unmerged[name], parameter.data = parameter.data, E
        self.merged_adapters.append(ADAPTER)

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit."""
        for name, W in self._unmerged.items():
            getattr(self.base_layer, name).data = W
        self._unmerged.clear()
        self.merged_adapters.clear()

    def _hold(self, suffix: str, factors: Factors, device: torch.device) -> None:
        for name, first in zip(ADAPTERS[self.kind].names, factors, strict=True):
            held = getattr(self, f"lora_{name}", None) or nn.ParameterDict()
            held[f"{ADAPTER}{suffix}"] = nn.Parameter(first.to(device))
            setattr(self, f"lora_{name}", held)

    def factors(self, suffix: str = "") -> Factors:
        """The trained tensors in the adapter's order; `_NAME` for those of a fused tensor."""
        return tuple(getattr(self, f"lora_{name}")[f"{ADAPTER}{suffix}"] for name in ADAPTERS[self.kind].names)


class MaskedLinear(MaskedTuner):
    """A linear layer under a mask."""

    keep: torch.Tensor | None  # the packed mask of the weight

    def __init__(self, base_layer: nn.Module, adapter: str, alpha: float, rank: int, keep: torch.Tensor | None) -> None:
        super().__init__(base_layer, adapter, alpha, rank)
        self.register_buffer("keep", keep, persistent=False)
        self._hold("", ADAPTERS[adapter].start(self.matrix, keep, rank), self.matrix.device)

    @property
    def matrix(self) -> torch.Tensor:
        """The base weight W (out, in); a view of it where the base layer holds (in, out)."""
        W = cast(torch.Tensor, self.base_layer.weight)
        return W.T if isinstance(self.base_layer, Conv1D) else W

    def forward_adapted(self, x: torch.Tensor) -> torch.Tensor:
        """y (..., out) of x (..., in)."""
        bias = cast("torch.Tensor | None", self.base_layer.bias)
        return sparse_linear(x, self.matrix, bias, self.factors(), self.scaling, self.keep, self.kind)

    def effective(self) -> dict[str, torch.Tensor]:
        """E in the layout of the base weight."""
        E = effective(self.kind, self.matrix.data, self.factors(), self.scaling, self.keep)
        return {"weight": E.T.contiguous() if isinstance(self.base_layer, Conv1D) else E}


class MaskedExperts(MaskedTuner):
    """Fused experts under masks: every tensor of them has one of each factor per expert.

    The module computes its own products, so autograd keeps the effective weights of the tensors until backward; with
    gradient checkpointing those of one block only.
    """

    def __init__(
        self, base_layer: nn.Module, adapter: str, alpha: float, rank: int, keep: dict[str, list[torch.Tensor]]
    ) -> None:
        super().__init__(base_layer, adapter, alpha, rank)
        self.names = tuple(keep)
        stack = stack_of(base_layer)
        self.transposed = stack is not None and stack.transposed
        for name, masks in keep.items():
            self.register_buffer(f"keep_{name}", torch.stack(masks), persistent=False)
            W = self.matrices(name)
            each = [ADAPTERS[adapter].start(w, bits, rank) for w, bits in zip(W, masks, strict=True)]
            # experts may keep different numbers of weights: short lists of values end in zeros that are never read
            self._hold(f"_{name}", tuple(pad_sequence(list(own), True) for own in zip(*each, strict=True)), W.device)

    def matrices(self, name: str) -> torch.Tensor:
        """The base weights (experts, out, in) of a tensor; a view of it where it holds (experts, in, out)."""
        W = getattr(self.base_layer, name)
        return W.transpose(1, 2) if self.transposed else W

    def effective(self) -> dict[str, torch.Tensor]:
        """E of every tensor, in the layout of the base weights."""
        made = {}
        for name in self.names:
            E = _Weight.apply(
                self.matrices(name), getattr(self, f"keep_{name}"), self.scaling, self.kind, *self.factors(f"_{name}")
            )
            made[name] = E.transpose(1, 2).contiguous() if self.transposed else E
        return made

    def forward_adapted(self, *args: Any, **kwargs: Any) -> Any:
        """The experts' own forward with the effective weights."""
        return functional_call(self.base_layer, self.effective(), args, kwargs)


@dataclass(frozen=True)
class AdapterTarget:
    """One layer, the rank of what is trained on it, and its packed mask; None for all of it."""

    layer: Layer
    rank: int
    keep: torch.Tensor | None
    adapter: str = "sparselora"


def add_adapters(model: nn.Module, targets: Sequence[AdapterTarget], *, alpha: float = 16, seed: int = 0) -> Any:
    """Wrap `model` in PEFT, in place, with an adapter on each target's layer; everything else is frozen.

    Factors are float32, whatever the model's dtype. Returns the `PeftModel`.
    """
    modules: dict[int, list[AdapterTarget]] = {}
    for target in targets:
        modules.setdefault(id(target.layer.module), []).append(target)

    def place(module: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module:
        first, *others = modules[id(module)]
        if first.layer.expert:
            adapter = "sparselora" if ADAPTERS[first.adapter].stock else first.adapter
            return MaskedExperts(module, adapter, alpha, first.rank, _by_tensor([first, *others], module))
        if type(module) not in (nn.Linear, Conv1D):
            raise SparsightError(
                f"{first.layer.name} is {type(module).__name__} and not a plain linear layer (a quantized base?); "
                "load the model in float32, bfloat16 or float16"
            )
        if ADAPTERS[first.adapter].stock:
            kwargs |= {"fan_in_fan_out": isinstance(module, Conv1D)}
            return LoraLinear(module, adapter_name, **{**kwargs, "r": first.rank})
        return MaskedLinear(module, first.adapter, alpha, first.rank, first.keep)

    names = {_module_name(target.layer): type(target.layer.module) for target in targets}
    config = LoraConfig(
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,  # it would train the dense product and not the masked weight
        target_modules="|".join(re.escape(name) for name in names),
        bias="none",
    )
    config._register_custom_module(dict.fromkeys({nn.Linear, *names.values()}, place))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 uses a name that transformers 5.23 has deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        with _names_as_they_are(model):
            return get_peft_model(model, config)


@contextlib.contextmanager
def _names_as_they_are(model: Any) -> Iterator[None]:
    """Keep PEFT from renaming targets: for some types it turns them into those of a checkpoint of transformers 4.

    A model that does not know its input embeddings, which PEFT asks for, has its first embedding as such meanwhile.
    """
    kind = model.config.model_type
    model.config.model_type = ""
    try:
        model.get_input_embeddings()
        asks = False
    except NotImplementedError:
        asks = True
        model.get_input_embeddings = lambda: next(m for m in model.modules() if isinstance(m, nn.Embedding))
    try:
        yield
    finally:
        if asks:
            del model.get_input_embeddings
        del model.config.model_type
        if model.config.model_type != kind:  # it was the configuration's own, and not its class's
            model.config.model_type = kind


def adapted_modules(model: nn.Module) -> dict[str, LoraLinear | MaskedTuner]:
    """The adapted modules of a wrapped model, by the name of the module they wrap."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLinear | MaskedTuner)}


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that is trained, as `MODULE.A`, `MODULE.B`, `MODULE.values`; experts as `MODULE.A_down_proj`."""
    parameters = {}
    for name, module in adapted_modules(model).items():
        if isinstance(module, LoraLinear):
            for letter, held in (("A", module.lora_A), ("B", module.lora_B)):
                parameters[f"{name}.{letter}"] = cast(nn.Parameter, cast(nn.Linear, held[ADAPTER]).weight)
            continue
        for letter in ADAPTERS[module.kind].names:
            for key, parameter in getattr(module, f"lora_{letter}").items():
                parameters[f"{name}.{letter}{key.removeprefix(ADAPTER)}"] = parameter
    return parameters


def _module_name(layer: Layer) -> str:
    """The module's path; the layer name of a fused expert has its tensor and its index, too."""
    return layer.name.rsplit(".", 2)[0] if layer.expert else layer.name


def _by_tensor(targets: Sequence[AdapterTarget], module: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The masks of a module's experts in order, by tensor; an expert that is not pruned has a mask of ones."""
    by_tensor: dict[str, list[torch.Tensor]] = {}
    for target in targets:
        key, index = cast(tuple[str, int], target.layer.expert)
        count = len(getattr(module, key))
        masks = by_tensor.setdefault(key, [pack(torch.ones_like(target.layer.weight, dtype=torch.bool))] * count)
        if target.keep is not None:
            masks[index] = target.keep
    return by_tensor
