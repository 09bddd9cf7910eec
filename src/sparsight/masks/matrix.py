"""What is counted and masked of a whole matrix, in as few passes as torch allows.

`isfinite().all()`, `isnan().any()`, `masked_fill`, `count_nonzero` and comparisons with zero of floats, and sums of booleans
take five to thirty times as long on a CPU: they make copies, or are not vectorized.
"""

from __future__ import annotations

import torch

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
LANES = 64  # entries of a row that are summed eight at a time


def mask_of(W: torch.Tensor) -> torch.Tensor:
    """True where a weight is not zero, like W; -0.0 is zero, NaN is not."""
    return W.bool()


def keep_only(W: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """A detached copy of W with +0.0 wherever a mask of its shape is False; kept weights have the same bits."""
    word = WORDS.get(W.element_size())
    if word is None or W.is_complex():
        return W.detach().masked_fill(~keep, 0)
    return keep.to(word).neg_().bitwise_and_(W.detach().view(word)).view(W.dtype)


def count_zeros(W: torch.Tensor) -> int:
    """The number of zeros, -0.0 among them."""
    return W.numel() - int(mask_of(W).count_nonzero())


def kept_of_rows(keep: torch.Tensor) -> torch.Tensor:
    """How many entries of every row of a mask (rows, columns) are True: (rows,) int32."""
    rows, columns = keep.shape
    if not keep.numel() or columns % LANES:
        return keep.view(torch.uint8).sum(1, dtype=torch.int32)
    words = _aligned(keep).view(torch.int64).view(rows, columns // LANES, LANES // 8)
    return words.sum(-1).view(torch.uint8).sum(1, dtype=torch.int32)  # no byte of a word overflows: it sums eight ones


def most_of_groups(keep: torch.Tensor, m: int) -> int:
    """The most entries that are True of any m in a row of a mask (rows, columns), whose columns m divides."""
    if not keep.numel():
        return 0
    if m not in WORDS:
        return int(keep.reshape(-1, m).sum(1, dtype=torch.int32).amax())
    ones = int.from_bytes(b"\x01" * m, "little")
    sums = _aligned(keep).view(WORDS[m]) * ones  # of the bytes of a word, in its highest byte
    return int(sums.amax()) >> 8 * (m - 1)


def _aligned(keep: torch.Tensor) -> torch.Tensor:
    """A mask whose bytes may be taken as words: row after row, from a multiple of eight on."""
    keep = keep.contiguous()
    return keep.clone() if keep.storage_offset() % 8 else keep


def are_same(W: torch.Tensor, other: torch.Tensor, where: torch.Tensor) -> bool:
    """Whether two matrices of a shape and dtype hold the same bits wherever a mask of that shape is True."""
    word = WORDS.get(W.element_size())
    differ = other != W if word is None else (W.view(word) ^ other.view(word)).bool()
    return not bool(differ.view(torch.uint8).bitwise_and_(where.view(torch.uint8)).any())


def has_nan(W: torch.Tensor) -> bool:
    """Whether an entry is NaN: the largest is, then."""
    return bool(W.numel() and W.detach().amax().isnan())


def is_finite(W: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite: the extremes say it, and NaN is passed on to them."""
    if not W.numel():
        return True
    low, high = torch.aminmax(W.detach())
    return bool(low.isfinite() & high.isfinite())
