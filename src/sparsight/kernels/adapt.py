"""The masked low-rank products of SparseLoRA, the masks in bits: C++ on the CPU (`adapt.cpp`), Triton on a GPU.

Computed in float32 and rounded once, to nearest even; exactly +0 where the mask is 0, whatever the input there. The same
inputs give the same bits, on the CPU for a given number of threads. Every function returns None where it has no kernel.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch

from sparsight.kernels.build import DTYPES, library_for, logger


def merge(
    W: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    packed: torch.Tensor | None,
    *,
    times: bool = False,
) -> torch.Tensor | None:
    """Compute (W + s B A) * M, or with `times` W * (1 + s B A) * M, in W's dtype.

    W (out, in); A (r, in) and B (out, r) float32; `packed` the mask, None for all ones. The same bits for any number of
    threads.
    """
    if not _fit(W, A, B, packed):
        return None
    W, A, B, packed = _rows(W), A.contiguous(), B.contiguous(), None if packed is None else packed.contiguous()
    if (triton := _triton(W)) is not None:
        return triton.merge(W, A, B, scaling, packed, times)
    if (library := library_for(W)) is None:
        return None
    E = torch.empty(W.shape, dtype=W.dtype)
    success = library.sparsight_merge(
        W.data_ptr(), DTYPES[W.dtype], *W.shape, W.stride(0), A.data_ptr(), B.data_ptr(), len(A), scaling, *_bits(packed),
        times, E.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return E if success else None


def project(
    dE: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    packed: torch.Tensor | None,
    *,
    W: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute dA (r, in) = s B^T D and dB (out, r) = s D A^T in float32, where D = dE * M, times W if there is a W.

    dE (out, in) is the gradient of what `merge` returns; W, of dE's dtype, goes with `times`.
    """
    if not _fit(dE, A, B, packed) or not (W is None or _alike(W, dE)):
        return None
    dE, A, B, packed = _rows(dE), A.contiguous(), B.contiguous(), None if packed is None else packed.contiguous()
    W = None if W is None else _rows(W)
    if (triton := _triton(dE)) is not None:
        return triton.project(dE, A, B, scaling, packed, W)
    if (library := library_for(dE)) is None:
        return None
    dA, dB = torch.empty(A.shape), torch.empty(B.shape)
    factor = (None, 0) if W is None else (W.data_ptr(), W.stride(0))
    success = library.sparsight_project(
        dE.data_ptr(), DTYPES[dE.dtype], *dE.shape, dE.stride(0), *factor, A.data_ptr(), B.data_ptr(), len(A), scaling,
        *_bits(packed), dA.data_ptr(), dB.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return (dA, dB) if success else None


def expand(
    values: torch.Tensor, packed: torch.Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype
) -> torch.Tensor | None:
    """Put float32 `values` (nnz,) in order where the mask is 1: a tensor of `shape` and `dtype`, +0 elsewhere."""
    out = torch.empty(shape, dtype=dtype, device=values.device)
    if values.dtype != torch.float32 or not _covers(packed, out):
        return None
    values, packed = values.contiguous(), packed.contiguous()
    if (triton := _triton(out)) is not None:
        return triton.expand(values, packed, out)
    if (library := library_for(out)) is None:
        return None
    success = library.sparsight_expand(
        values.data_ptr(), len(values), *_bits(packed), out.numel(), DTYPES[dtype], out.data_ptr(), torch.get_num_threads()
    )
    return out if success else None


def compress(dE: torch.Tensor, packed: torch.Tensor) -> torch.Tensor | None:
    """Return the entries of dE where the mask is 1, in order, as float32 (nnz,): the gradient of `expand`."""
    if not _covers(packed, dE):
        return None
    dE, packed = dE.contiguous(), packed.contiguous()
    if (triton := _triton(dE)) is not None:
        return triton.compress(dE, packed)
    if (library := library_for(dE)) is None:
        return None
    count = torch.empty((), dtype=torch.int64)
    library.sparsight_count(*_bits(packed), count.data_ptr())
    values = torch.empty(int(count))
    success = library.sparsight_compress(
        dE.data_ptr(), DTYPES[dE.dtype], *_bits(packed), dE.numel(), values.data_ptr(), torch.get_num_threads()
    )
    return values if success else None


def pack(mask: torch.Tensor) -> torch.Tensor | None:
    """Pack a boolean mask into bits, in the layout of `masks/bits.py`; on the CPU only."""
    if (library := library_for(mask, torch.bool)) is None:
        return None
    mask, packed = mask.contiguous(), torch.empty((mask.numel() + 7) // 8, dtype=torch.uint8)
    library.sparsight_pack(mask.data_ptr(), mask.numel(), packed.data_ptr())
    return packed


def unpack(packed: torch.Tensor, count: int) -> torch.Tensor | None:
    """Undo `pack`: the first `count` bits as a flat boolean mask; on the CPU only."""
    if packed.numel() * 8 < count or (library := library_for(packed, torch.uint8)) is None:
        return None
    packed, mask = packed.contiguous(), torch.empty(count, dtype=torch.bool)
    library.sparsight_unpack(packed.data_ptr(), count, mask.data_ptr())
    return mask


def _fit(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, packed: torch.Tensor | None) -> bool:
    factors = all(t.dtype == torch.float32 and t.device == W.device for t in (A, B))
    shapes = W.ndim == A.ndim == B.ndim == 2 and A.shape == (B.shape[1], W.shape[1]) and len(B) == len(W)
    return factors and shapes and (packed is None or _covers(packed, W))


def _alike(W: torch.Tensor, dE: torch.Tensor) -> bool:
    return W.dtype == dE.dtype and W.shape == dE.shape and W.device == dE.device


def _covers(packed: torch.Tensor, W: torch.Tensor) -> bool:
    return packed.dtype == torch.uint8 and packed.device == W.device and packed.numel() == (W.numel() + 7) // 8


def _rows(W: torch.Tensor) -> torch.Tensor:
    return W if W.stride(1) == 1 else W.contiguous()


def _bits(packed: torch.Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if packed is None else (packed.data_ptr(), packed.numel())


def _triton(tensor: torch.Tensor) -> ModuleType | None:
    """Return `adapt_triton` if its kernels may run on `tensor`: on a GPU, or anywhere under Triton's interpreter."""
    place = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    fits = place and tensor.dtype in DTYPES and os.environ.get("SPARSIGHT_KERNELS") != "0"
    return _load_triton(tensor.device) if fits else None


@functools.cache
def _load_triton(device: torch.device) -> ModuleType | None:
    """Import the kernels and try one: they need Triton, a C compiler, and a GPU with bfloat16."""
    try:
        from sparsight.kernels import adapt_triton

        one = torch.ones(1, 1, device=device)
        adapt_triton.merge(one.bfloat16(), one, one, 1.0, None, False)
    except Exception as error:
        logger.info("no Triton kernels on %s, plain torch runs instead: %s", device, error)
        return None
    return adapt_triton
