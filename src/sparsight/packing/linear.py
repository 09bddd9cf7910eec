"""A linear layer that keeps its weight packed and multiplies with it as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sparsight import kernels
from sparsight.errors import SparsightError
from sparsight.kernels.build import DTYPES, library_for
from sparsight.packing.tensor import Packed, row_offsets

FEW, FEW_INT8 = 32, 64  # tokens, at most, that are multiplied with the packed weight; more are with dense rows
MANY = 512  # the same where the CPU has matrix tiles
SMALL = 1 << 19  # weights of a layer that fits into a cache, where torch is as fast or faster
TILE = 256  # rows that are expanded at a time: into a cache, and from there multiplied; with matrix tiles four times as many


class SparseLinear(nn.Module):
    """y = x W^T + b with a packed W (out, in): its kept values, its bits and, for int8 values, a scale per row.

    For inference: no gradient reaches the weight. `weight` holds the kept values and not W; `dense` gives W. On a CPU up to
    `FEW` tokens are multiplied with the packed weight itself, which reads fewer bytes, and in bfloat16 `MANY` where the
    CPU has matrix tiles; more tokens are multiplied with `TILE` dense rows at a time. Elsewhere, and without compiled
    kernels, W is expanded whole for every call.
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
        bias: torch.Tensor | None = self.bias
        if (dtype := _autocast_dtype(x)) is not None:  # as F.linear under autocast
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        multiply = _multiply if _plain(x) else sparse_linear
        return multiply(x, self.weight, self.weight_bits, self.weight_scale, bias, self._where())

    def count(self, packed: Packed | None = None) -> None:
        """Count where the values of each row begin, once for these bits; the first product does it, if nothing else did.

        `packed` is a weight that the layer will be given. **Raises** `SparsightError` for bits of other values.
        """
        packed = self.packed if packed is None else packed
        if not packed.bits.is_meta:
            offset = self._known[1] if self._known is not None and self._knows(packed.bits) else packed.offset()
            self._known = packed.bits, offset  # these very bits, so that a copy of the layer has them once

    def _knows(self, bits: torch.Tensor) -> bool:
        """Whether these bits were counted: the same memory, which is kept."""
        return self._known is not None and (self._known[0] is bits or _same_memory(self._known[0], bits))

    def _where(self) -> torch.Tensor:
        """Where the values of each row begin; empty where torch.compile looks at a layer that has not counted."""
        if not torch.compiler.is_compiling():
            self.count()
        return self.weight_bits.new_empty(0, dtype=torch.int64) if self._known is None else self._known[1]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._known = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = None if self.weight_scale is None else self.weight_scale.detach()
        bits = self.weight_bits.detach()  # on the way to a GPU and back the parameter stays the same object
        result = super()._apply(fn, recurse)
        after = self.weight_scale
        if self._known is not None and not _same_memory(bits, self.weight_bits):
            self._known = None
            with suppress(SparsightError):  # of memory that nothing was written into yet; the first product says it
                self.count()
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


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.device) == (b.data_ptr(), b.shape, b.device)


def check_dense(model: nn.Module, field: str = "model") -> None:
    """Refuse a model whose layers are packed. **Raises** `SparsightError`, naming `field`."""
    if has_packed_layers(model):
        raise SparsightError(
            f"`{field}`: its layers are packed, which is for inference; load the folder without `packed`, which expands them"
        )


def has_packed_layers(model: nn.Module) -> bool:
    """Whether some layers of a model are packed."""
    return any(isinstance(module, SparseLinear) for module in model.modules())


@torch.library.custom_op("sparsight::sparse_linear", mutates_args=())
def sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    offset: torch.Tensor,
) -> torch.Tensor:
    """x (..., in) times a packed weight (out, in), plus bias (out,).

    `offset` int64 (out + 1,) says where the values of each row begin; an empty one is counted anew.
    """
    return _multiply(x, values, bits, scale, bias, offset)


@sparse_linear.register_fake
def _(x: Any, values: Any, bits: Any, scale: Any, bias: Any, offset: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], bits.shape[0])


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that an autocast wants a product with x to have; None where it leaves x as it is."""
    kind = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):  # which does not know the meta device
        return None
    return torch.get_autocast_dtype(kind)


def _plain(x: torch.Tensor) -> bool:
    """Whether a product may run without the dispatcher, whose way takes longer than many a product: nothing looks on.

    A trace, a mode that records or counts, and a gradient see the operator, and would miss a plain call.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return False
    return x.is_cpu and type(x) is torch.Tensor and not (x.requires_grad and torch.is_grad_enabled())


def _multiply(
    x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None,
    offset: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    tokens = x.reshape(-1, x.shape[-1])
    if not offset.numel():  # not counted before torch.compile looked at the layer
        offset = row_offsets(bits)
    return _of_tokens(tokens, values, bits, scale, bias, offset).view(*x.shape[:-1], bits.shape[0])


def _of_tokens(
    x: torch.Tensor, values: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None,
    offset: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    alike = (values.dtype == x.dtype or scale is not None) and x.dtype in DTYPES and not x.is_cuda
    alike = alike and values.device == x.device and (bias is None or bias.dtype == x.dtype)
    few = alike and x.shape[0] <= _most(x, FEW if scale is None else FEW_INT8)
    if few and (y := kernels.product(x, values, bits, offset, bias, scale)) is not None:
        return y
    shape = (bits.shape[0], x.shape[-1])
    if alike and library_for(values, values.dtype) is not None:
        tile = torch.empty(min(_tile_rows(x), shape[0]), shape[1], dtype=values.dtype)

        def dense_rows(part: slice) -> torch.Tensor:
            W = tile[: part.stop - part.start]
            kernels.expand_rows(values, bits, offset, shape[1], W, part.start)
            return W if scale is None else W.float() * scale[part].unsqueeze(1)

        return _by_tiles(x, shape[0], dense_rows, bias)
    return F.linear(x, Packed(values, bits, shape, scale).expand(x.dtype, offset), bias)


def _by_tiles(
    x: torch.Tensor, rows: int, dense_rows: Callable[[slice], torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + b with some dense rows of W at a time, in the dtype in which torch is fast."""
    step = _tile_rows(x)
    wide = x.to(_fast(x.dtype))
    bias = None if bias is None else bias.to(wide.dtype)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype)
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        out[:, part] = F.linear(wide, dense_rows(part).to(wide.dtype), None if bias is None else bias[part])
    return out


def _most(x: torch.Tensor, few: int) -> int:
    """How many tokens our own products take, which is `few` without matrix tiles."""
    return MANY if kernels.has_tiles(x) else few


def _tile_rows(x: torch.Tensor) -> int:
    return TILE * 4 if kernels.has_tiles(x) else TILE


def _ours_is_faster(x: torch.Tensor) -> bool:
    return x.numel() <= _most(x, FEW) * x.shape[-1] or _fast(x.dtype) != x.dtype


@functools.cache
def _fast(dtype: torch.dtype) -> torch.dtype:
    """In which dtype torch is fastest with many tokens here: without AVX-512, 16-bit products take several times as long."""
    return dtype if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else torch.float32


class DenseLinear(nn.Linear):
    """An ordinary linear layer in bfloat16 that is multiplied faster than torch does it on a CPU, for inference.

    Few tokens take our own dense product, and where the CPU has matrix tiles many do. On a CPU where torch is slow in
    bfloat16 they are multiplied in float32, some rows at a time; everywhere else it is `nn.Linear`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        W = self.weight
        ours = W.dtype == x.dtype == torch.bfloat16 and not W.is_cuda
        ours = ours and (self.bias is None or self.bias.dtype == x.dtype) and _autocast_dtype(x) in (None, x.dtype)
        # torch.compile cannot ask for tiles: it takes the operator, which looks at the number of tokens itself
        ours = ours and (torch.compiler.is_compiling() or _ours_is_faster(x))
        if not ours or (torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)):
            return super().forward(x)
        multiply = _multiply_dense if _plain(x) else dense_linear
        return multiply(x, W, self.bias)


@torch.library.custom_op("sparsight::dense_linear", mutates_args=())
def dense_linear(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., in) times a dense W (out, in), plus bias (out,)."""
    return _multiply_dense(x, W, bias)


def _multiply_dense(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    tokens, W = x.reshape(-1, x.shape[-1]), W.contiguous()
    y: torch.Tensor | None = None
    if tokens.shape[0] <= _most(x, FEW):
        y = kernels.product(tokens, W, None, None, bias)
    elif _fast(x.dtype) != x.dtype:
        y = _by_tiles(tokens, W.shape[0], lambda part: W[part], bias)
    return F.linear(x, W, bias) if y is None else y.view(*x.shape[:-1], W.shape[0])


@dense_linear.register_fake
def _(x: Any, W: Any, bias: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], W.shape[0])


def use_own_products(model: nn.Module) -> None:
    """Make every large linear layer of a model that is dense a `DenseLinear`, in place; its parameters stay."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= SMALL:
            module.__class__ = DenseLinear
