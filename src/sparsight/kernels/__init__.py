"""Inner loops in C++ for the CPU, compiled at first use, about three seconds once per machine, and a few in Triton for CUDA;
without a compiler plain torch does the same.

Every function returns False or None where it has no kernel: no compiler, another device, dtype or shape,
`SPARSIGHT_KERNELS=0`. The caller then runs its torch code. Masks are the same either way; swept weights are equal up to
rounding.
"""

from __future__ import annotations

import torch

from sparsight.kernels.adapt import compress, expand, merge, pack, project, unpack
from sparsight.kernels.build import library_for, load
from sparsight.kernels.sparse import expand_rows, has_tiles, pack_rows, product, read, row_offsets

__all__ = [
    "add_gram",
    "compress",
    "expand",
    "expand_rows",
    "has_tiles",
    "keep_largest",
    "keep_of_group",
    "load",
    "merge",
    "pack",
    "pack_rows",
    "product",
    "project",
    "read",
    "row_offsets",
    "swap_rows",
    "sweep",
    "unpack",
]

WIDTH = 128  # columns of a sweep, at most
GROUPS = (2, 4, 8)  # the m of n:m that are compiled


def sweep(
    W: torch.Tensor,
    U: torch.Tensor,
    scale: torch.Tensor,
    start: int,
    stop: int,
    keep: torch.Tensor | None,
    n: int,
    m: int,
) -> bool:
    """Prune columns `start` to `stop` of W (out, in) and update those behind them, in place; False without a kernel.

    U (in, in) is the inverse factor, `scale` (in,) 1 / its diagonal. `keep` (out, stop - start) is the block's mask;
    without it the n of every m to keep are chosen during the sweep.
    """
    compiled = keep is not None or m in GROUPS
    if stop - start > WIDTH or not compiled or (library := library_for(W)) is None:
        return False
    U, scale = U.contiguous(), scale.contiguous()
    mask = None if keep is None else keep.contiguous()
    address = None if mask is None else mask.data_ptr()
    rows, columns = W.shape
    library.sparsight_sweep(
        W.data_ptr(), rows, columns, W.stride(0), U.data_ptr(), U.stride(0), scale.data_ptr(), start, stop, address, n, m,
        torch.get_num_threads(),
    )  # fmt: skip
    return True


def keep_largest(score: torch.Tensor, count: int) -> torch.Tensor | None:
    """Mark exactly the `count` largest entries of every row of `score` (rows, columns); 0 < count < columns."""
    if (library := library_for(score)) is None:
        return None
    score = score.float().contiguous()
    keep = torch.empty(score.shape, dtype=torch.bool)
    library.sparsight_keep_largest(score.data_ptr(), *score.shape, count, keep.data_ptr(), torch.get_num_threads())
    return keep


def keep_of_group(score: torch.Tensor, n: int) -> torch.Tensor | None:
    """Mark the `n` largest of the last dimension of `score`, which is one of `GROUPS`."""
    m = score.shape[-1]
    if m not in GROUPS or (library := library_for(score)) is None:
        return None
    score = score.float().contiguous()
    keep = torch.empty(score.shape, dtype=torch.bool)
    library.sparsight_keep_of_group(score.data_ptr(), score.numel() // m, n, m, keep.data_ptr())
    return keep


def swap_rows(
    W: torch.Tensor, keep: torch.Tensor, G: torch.Tensor, c: torch.Tensor, floor: torch.Tensor, m: int, cycles: int
) -> torch.Tensor | None:
    """Swap kept and pruned weights of every row of W (out, in) while that lowers the error by more than `floor` (out,).

    c (out, in) is the pruned part times the Gram matrix G (in, in); m of n:m, or 0. Returns the new mask.
    """
    if (library := library_for(W)) is None:
        return None
    W, G, c, floor = (t.float().contiguous() for t in (W, G, c.clone(), floor))
    mask = keep.to(torch.uint8, copy=True, memory_format=torch.contiguous_format)
    addresses = [t.data_ptr() for t in (W, mask, G, c, floor)]
    library.sparsight_swap_rows(*addresses, *W.shape, m, cycles, torch.get_num_threads())
    return mask.bool()


def add_gram(X: torch.Tensor, upper: torch.Tensor) -> bool:
    """Add X^T X of bfloat16 inputs X (tokens, in) to the upper triangle of `upper` (in, in) float32, in place.

    False without a kernel: other dtypes, CPUs without bfloat16 products. The lower triangle is undefined.
    """
    if X.dtype != torch.bfloat16 or X.stride(1) != 1 or (library := library_for(X)) is None:
        return False
    return bool(library.sparsight_gram(X.data_ptr(), *X.shape, X.stride(0), upper.data_ptr(), torch.get_num_threads()))
