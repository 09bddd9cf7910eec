"""Products with packed weights, a bitmask and the values that it keeps, and the way there and back; see `sparse.cpp`.

A matrix of `rows` and `columns` has `bits` uint8 (rows, ceil(columns / 8)), lowest bit first, each row from a byte on, the
kept `values` row after row, and `offset` int64 (rows + 1,): where the values of each row begin. Every function returns None
where it has no kernel; the caller then runs its torch code.
"""

from __future__ import annotations

import torch

from sparsight.kernels.build import DTYPES, library_for

SIZES = (1, 2, 4)  # bytes of a value
FEW, FEW_INT8 = 2, 8  # tokens, at most, that are multiplied without matrix tiles where there are some


def pack_rows(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The values and bits of W (rows, columns); kept is every value but +0, by its bytes."""
    if W.element_size() not in SIZES or (library := library_for(W, W.dtype)) is None:
        return None
    W = W.contiguous()
    bits = torch.empty(W.shape[0], (W.shape[1] + 7) // 8, dtype=torch.uint8)
    values = torch.empty(W.numel() + 64 // W.element_size(), dtype=W.dtype)
    kept = torch.empty((), dtype=torch.int64)
    library.sparsight_pack_rows(
        W.data_ptr(), W.element_size(), *W.shape, bits.data_ptr(), values.data_ptr(), kept.data_ptr()
    )  # fmt: skip
    return values[: int(kept)].clone(), bits


def row_offsets(bits: torch.Tensor) -> torch.Tensor | None:
    """Where the values of each row begin, int64 (rows + 1,); the last entry is their number."""
    if (library := library_for(bits, torch.uint8)) is None:
        return None
    bits = bits.contiguous()
    offset = torch.empty(len(bits) + 1, dtype=torch.int64)
    library.sparsight_offsets(bits.data_ptr(), *bits.shape, offset.data_ptr())
    return offset


def expand_rows(
    values: torch.Tensor, bits: torch.Tensor, offset: torch.Tensor, columns: int, out: torch.Tensor, first: int = 0
) -> bool:
    """Write the dense rows from `first` on into `out` (some rows, columns), contiguous; False without a kernel.

    The caller answers for `offset`, which has to be that of `bits`, and end with the number of `values`.
    """
    if values.element_size() not in SIZES or (library := library_for(values, values.dtype)) is None:
        return False
    library.sparsight_expand_rows(
        values.data_ptr(), values.element_size(), bits.data_ptr(), offset.data_ptr(), len(bits), columns, first,
        first + len(out), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return True


def has_tiles(x: torch.Tensor) -> bool:
    """Whether products of inputs like x run by matrix tiles here, which are fast with many tokens, too."""
    return (library := library_for(x, torch.bfloat16)) is not None and bool(library.sparsight_has_tiles())


def product(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor | None,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """x W^T + bias, (tokens, rows), of inputs x (tokens, columns), summed in float32 and rounded once.

    Values, x and bias have one dtype of `DTYPES`; with `scale` (rows,) float32, the values are int8, and x is rounded to
    int8 with a scale per token and 256 columns, but not where matrix tiles multiply. Without bits and offset W is the
    dense `values` (rows, columns): for bfloat16, and for int8.
    """
    if (library := library_for(x)) is None:
        return None
    x = x.contiguous()
    (tokens, columns), rows = x.shape, (values if bits is None else bits).shape[0]
    out = torch.empty(tokens, rows, dtype=x.dtype)
    walk = (None, None) if bits is None or offset is None else (bits.data_ptr(), offset.data_ptr())
    sizes = (*walk, rows, columns, x.data_ptr(), tokens, None if bias is None else bias.data_ptr(), out.data_ptr())
    threads, scales = torch.get_num_threads(), None if scale is None else scale.data_ptr()
    if tokens > (FEW if scale is None else FEW_INT8) and has_tiles(x):
        success = library.sparsight_product_tiles(values.data_ptr(), scales, *sizes, threads)
    elif scale is None:
        success = library.sparsight_product(values.data_ptr(), DTYPES[x.dtype], *sizes, threads)
    else:
        success = library.sparsight_product_int8(values.data_ptr(), scales, DTYPES[x.dtype], *sizes, threads)
    return out if success else None


def read(data: torch.Tensor) -> bool:
    """Read all of `data`, as products read weights; False without a kernel."""
    if (library := library_for(data, data.dtype)) is None:
        return False
    total = torch.empty((), dtype=torch.int64)
    library.sparsight_read(data.data_ptr(), data.nbytes // 8, total.data_ptr(), torch.get_num_threads())
    return True
