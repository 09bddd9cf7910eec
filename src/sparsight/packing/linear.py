"""A linear layer that keeps its weight packed and multiplies with it as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparsight import kernels
from sparsight.errors import SparsightError
from sparsight.kernels.build import DTYPES
from sparsight.packing.tensor import Packed

FEW, FEW_INT8 = 32, 64  # tokens, at most, that are multiplied with the packed weight; more are with dense tiles
SMALL = 1 << 19  # weights of a layer that fits into a cache, where torch is as fast or faster
TILE = 256  # rows that are expanded at a time: into a cache, and from there multiplied


class SparseLinear(nn.Module):
    """y = x W^T + b with a packed W (out, in): its kept values, its bits and, for int8 values, a scale per row.

    For inference: no gradient reaches the weight. `weight` holds the kept values and not W; `dense` gives W. On a CPU up to
    `FEW` tokens are multiplied with the packed weight itself, which reads fewer bytes; more tokens are multiplied with
    tiles of `TILE` dense rows. Elsewhere, and without compiled kernels, W is expanded whole for every call.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, values: torch.Tensor, bits: torch.Tensor,
        scale: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(values.contiguous(), requires_grad=False)
        self.weight_bits = nn.Parameter(bits.contiguous(), requires_grad=False)
        self.weight_scale = None if scale is None else nn.Parameter(scale.contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._known: tuple[torch.Tensor, torch.Tensor] | None = None  # bits, and where the values of their rows begin

    @classmethod
    def of(cls, linear: nn.Linear, int8: bool = False) -> SparseLinear:
        """The packed form of a linear layer; its bias is shared."""
        packed = Packed.int8(linear.weight) if int8 else Packed.of(linear.weight)
        values = packed.values.reshape(-1)
        return cls(linear.in_features, linear.out_features, values, packed.bits, packed.scale, linear.bias)

    @classmethod
    def empty(cls, linear: nn.Linear, size: int, int8: bool = False) -> SparseLinear:
        """A layer with room for `size` values, on the device of `linear`, to load a packed weight into."""
        rows, columns = linear.out_features, linear.in_features
        device, dtype = linear.weight.device, torch.int8 if int8 else linear.weight.dtype
        values = torch.empty(size, dtype=dtype, device=device)
        bits = torch.empty(rows, (columns + 7) // 8, dtype=torch.uint8, device=device)
        scale = torch.empty(rows, device=device) if int8 else None
        return cls(columns, rows, values, bits, scale, linear.bias)

    @property
    def packed(self) -> Packed:
        """The packed weight."""
        return Packed(self.weight, self.weight_bits, (self.out_features, self.in_features), self.weight_scale)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W (out, in), expanded."""
        return self.packed.expand(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out). **Raises** `SparsightError` for another number of features."""
        if x.shape[-1] != self.in_features:
            raise SparsightError(
                f"inputs of {x.shape[-1]} features were given to a packed layer that takes {self.in_features}"
            )
        return sparse_linear(x, self.weight, self.weight_bits, self.weight_scale, self.bias, self._where())

    def _where(self) -> torch.Tensor:
        """Where the values of each row begin; counted once, and again for other bits."""
        bits = self.weight_bits
        if self._known is None or self._known[0] is not bits:
            self._known = bits, self.packed.offset()
        return self._known[1]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._known = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = None if self.weight_scale is None else self.weight_scale.detach()
        result = super()._apply(fn, recurse)
        self._known, after = None, self.weight_scale
        if before is not None and after is not None and after.dtype != before.dtype:  # float32, whatever the rest becomes
            self.weight_scale = nn.Parameter(before.to(after.device), requires_grad=False)
        return result

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        sparsity = 1 - self.weight.numel() / (self.in_features * self.out_features)
        values = "int8" if self.weight_scale is not None else str(self.weight.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={sparsity:.3f}, values={values}"
        )


@torch.library.custom_op("sparsight::sparse_linear", mutates_args=())
def sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    offset: torch.Tensor,
) -> torch.Tensor:
    """x (..., in) times a packed weight (out, in), plus bias (out,); `offset` says where the values of each row begin."""
    tokens = x.reshape(-1, x.shape[-1])
    return _multiply(tokens, values, bits, scale, bias, offset).view(*x.shape[:-1], len(bits))


@sparse_linear.register_fake
def _(x: Any, values: Any, bits: Any, scale: Any, bias: Any, offset: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], bits.shape[0])


def _multiply(
    x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None,
    offset: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    alike = (values.dtype == x.dtype or scale is not None) and x.dtype in DTYPES and not x.is_cuda
    alike = alike and values.device == x.device and (bias is None or bias.dtype == x.dtype)
    few = alike and len(x) <= (FEW if scale is None else FEW_INT8)
    if few and (y := kernels.product(x, values, bits, offset, bias, scale)) is not None:
        return y
    rows, columns = len(bits), x.shape[-1]
    if alike and (y := _by_tiles(x, values, bits, scale, bias, offset)) is not None:
        return y
    return F.linear(x, Packed(values, bits, (rows, columns), scale).expand(x.dtype, offset), bias)


def _by_tiles(
    x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None,
    offset: torch.Tensor,
) -> torch.Tensor | None:  # fmt: skip
    """x W^T + b with W expanded `TILE` rows at a time; None without compiled kernels."""
    rows, columns = len(bits), x.shape[-1]
    out = torch.empty(len(x), rows, dtype=x.dtype)
    tile = torch.empty(min(TILE, rows), columns, dtype=values.dtype)
    for first in range(0, rows, TILE):
        W = tile[: min(TILE, rows - first)]
        if not kernels.expand_rows(values, bits, offset, columns, W, first):
            return None
        part = slice(first, first + len(W))
        if scale is not None:
            W = (W.float() * scale[part].unsqueeze(1)).to(x.dtype)
        out[:, part] = F.linear(x, W, None if bias is None else bias[part])
    return out


class DenseLinear(nn.Linear):
    """An ordinary linear layer that multiplies few tokens by our own dense product, for inference.

    It reads bfloat16 weights faster than torch does on a CPU with AVX-512; everywhere else it is `nn.Linear`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        W = self.weight
        few = x.numel() <= FEW * self.in_features and W.dtype == x.dtype == torch.bfloat16 and not W.is_cuda
        if not few or (torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)):
            return super().forward(x)
        return dense_linear(x, W, self.bias)


@torch.library.custom_op("sparsight::dense_linear", mutates_args=())
def dense_linear(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., in) times a dense W (out, in), plus bias (out,)."""
    y = kernels.product(x.reshape(-1, x.shape[-1]), W.contiguous(), None, None, bias)
    return F.linear(x, W, bias) if y is None else y.view(*x.shape[:-1], len(W))


@dense_linear.register_fake
def _(x: Any, W: Any, bias: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], W.shape[0])


def use_own_products(model: nn.Module) -> None:
    """Make every large linear layer of a model that is dense a `DenseLinear`, in place; its parameters stay."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= SMALL:
            module.__class__ = DenseLinear
