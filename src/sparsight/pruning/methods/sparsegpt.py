"""SparseGPT: prune column after column, and correct each error in the later columns of the row
(Frantar & Alistarh, arXiv 2301.00774; code IST-DASLab/sparsegpt).

With U^T U = G^-1 (`calibration/inverse_factor.py`), blocks of 128 columns; weights go where w_ij^2 / U_jj^2 is small:

    err_i = w_i / U_ii if pruned else 0,    w_j -= err_i U_ij for all j > i

Ours differs: counts are exact (the published threshold prunes one weight too many in every block) and add up over the
blocks; weights of dead columns go first, where the published code prunes all of them at any sparsity; `row`, which the
paper does not have, is an exact count in every row of every block. Weights are scored by |w| / U_jj, which has the same
order and cannot underflow. With a compiler, one kernel sweeps a block's columns; masks are the same as those of the plain
torch below, weights up to rounding.
"""

from __future__ import annotations

import torch

from sparsight import kernels
from sparsight.calibration.moments import Moments
from sparsight.masks.pattern import Pattern, keep_largest, keep_of_group

BLOCK = 128


def sparsegpt(W: torch.Tensor, moments: Moments, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    """Return W (out, in) pruned and updated, a new tensor: w_j -= (w_i / U_ii) U_ij for every pruned i < j; needs the Gram.

    Computed in float32. Cost: out * in^2. **Raises** `ValueError` if W holds NaN or infinity.
    """
    rows, columns = W.shape
    pattern.check((rows, columns))
    U = moments.inverse_factor().to(W.device).contiguous()  # (in, in)
    scale = 1 / U.diagonal()  # (in,)
    dead = moments.gram.diagonal().to(W.device) == 0
    scale = torch.where(dead, (scale.min() * 1e-20).clamp(min=1e-37), scale)  # below all others, above a zero weight
    pruned = W.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(pruned.sum()):
        raise ValueError("the weights hold NaN or infinity")
    width = BLOCK if pattern.kind != "n:m" else max(BLOCK // pattern.m, 1) * pattern.m
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        keep = None if pattern.kind == "n:m" else choose(pruned[:, start:stop].abs() * scale[start:stop], pattern, start)
        if not kernels.sweep(pruned, U, scale, start, stop, keep, pattern.n, pattern.m):
            sweep(pruned, U, scale, start, stop, keep, pattern.n, pattern.m)
    return pruned.to(W.dtype)


def choose(score: torch.Tensor, pattern: Pattern, start: int) -> torch.Tensor:
    """Return the mask (out, width) of a block that begins at column `start`; counts are exact over all blocks."""
    rows, width = score.shape
    if pattern.kind == "row":
        return keep_largest(score, width - pattern.zeros((1, start + width)) + pattern.zeros((1, start)))
    zeros = pattern.zeros((rows, start + width)) - pattern.zeros((rows, start))
    return keep_largest(score.reshape(1, -1), score.numel() - zeros).view_as(score)


def sweep(
    W: torch.Tensor,
    U: torch.Tensor,
    scale: torch.Tensor,
    start: int,
    stop: int,
    keep: torch.Tensor | None,
    n: int,
    m: int,
) -> None:
    """Prune columns `start` to `stop` of W (out, in) and update those behind them, in place.

    `keep` (out, stop - start) is the block's mask; without it the n of every m to keep are chosen during the sweep.
    """
    block, scale, near = W[:, start:stop], scale[start:stop], U[start:stop, start:stop]
    error = torch.empty_like(block)
    prune = torch.empty_like(block, dtype=torch.bool) if keep is None else ~keep
    for i in range(stop - start):
        if keep is None and i % m == 0:
            prune[:, i : i + m] = ~keep_of_group(block[:, i : i + m].abs() * scale[i : i + m], n)
        error[:, i] = (block[:, i] * scale[i]).masked_fill(~prune[:, i], 0)
        block[:, i].masked_fill_(prune[:, i], 0)
        block[:, i + 1 :] -= error[:, i, None] * near[i, i + 1 :]
    W[:, stop:] -= error @ U[start:stop, stop:]
