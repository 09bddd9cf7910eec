"""Where zeros may be, and how many: the one place that turns scores into masks.

Counts are exact. Published codes select by threshold (`score <= kthvalue`), which prunes too many weights where scores
tie; here a tie is broken by index, and of two equal scores the one with the lower index is kept.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from sparsight import kernels
from sparsight.errors import SparsightError
from sparsight.masks.matrix import has_nan, kept_of_rows, mask_of, most_of_groups


@dataclass(frozen=True)
class Pattern:
    """`row`: a number of zeros in every row; `tensor`: a number in the whole matrix; `n:m`: n kept of every m inputs."""

    kind: str
    sparsity: float
    n: int = 0
    m: int = 0

    @classmethod
    def row(cls, sparsity: float) -> Pattern:
        """Prune the fraction `sparsity` of every row."""
        return cls("row", check_sparsity(sparsity))

    @classmethod
    def tensor(cls, sparsity: float) -> Pattern:
        """Prune the fraction `sparsity` of the whole matrix, wherever in it."""
        return cls("tensor", check_sparsity(sparsity))

    @classmethod
    def nm(cls, n: int, m: int) -> Pattern:
        """Keep `n` of every `m` along the input dimension; **raises** `SparsightError` unless 0 < n < m."""
        if not 0 < n < m:
            raise SparsightError(
                f"`pattern`: '{n}:{m}' keeps {n} of every {m}; n:m needs 0 < n < m, as in 2:4 (two of four kept) or 4:8"
            )
        return cls("n:m", 1 - n / m, n, m)

    @classmethod
    def parse(cls, text: str, sparsity: float = 0.5) -> Pattern:
        """Read `row`, `tensor` or `n:m`; `sparsity` counts for the first two. **Raises** `SparsightError` for other text."""
        if not isinstance(text, str):
            raise SparsightError(f"`pattern`: {text!r} is not row, tensor or n:m (n kept of every m, as in 2:4)")
        if match := re.fullmatch(r"\s*(\d+):(\d+)\s*", text):
            return cls.nm(int(match[1]), int(match[2]))
        if text not in ("row", "tensor"):
            raise SparsightError(f"`pattern`: {text!r} is not row, tensor or n:m (n kept of every m, as in 2:4)")
        return cls.row(sparsity) if text == "row" else cls.tensor(sparsity)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.kind == "n:m" else f"{self.kind} {self.sparsity:.12g}"

    def zeros(self, shape: tuple[int, int]) -> int:
        """Return the number of zeros in a matrix of `shape` (out, in); a fraction is rounded per row or matrix."""
        rows, columns = shape
        if self.kind == "row":
            return rows * _nearest(self.sparsity * columns)
        if self.kind == "tensor":
            return _nearest(self.sparsity * rows * columns)
        self.check(shape)
        return rows * (columns // self.m) * (self.m - self.n)

    def check(self, shape: tuple[int, int], name: str = "the layer") -> None:
        """Refuse a shape (out, in) that n:m does not divide: **raises** `SparsightError` with the layer's `name`."""
        if self.kind == "n:m" and shape[1] % self.m:
            raise SparsightError(
                f"`pattern`: {self} does not fit {name}: its input dimension {shape[1]} is not a multiple of {self.m}; "
                f"leave it dense with `ignore={name}`, or choose another pattern"
            )

    def keep(self, score: torch.Tensor) -> torch.Tensor:
        """Return a boolean mask like `score` (out, in), True where a weight is kept.

        The highest scores stay. **Raises** `ValueError` on NaN, for which no order exists.
        """
        if has_nan(score):
            raise ValueError("the score holds NaN")
        rows, columns = score.shape
        if self.kind == "row":
            return keep_largest(score, columns - _nearest(self.sparsity * columns))
        if self.kind == "tensor":
            return keep_largest(score.reshape(1, -1), score.numel() - self.zeros((rows, columns))).view_as(score)
        self.check((rows, columns))
        return keep_of_group(score.reshape(rows, columns // self.m, self.m), self.n).view_as(score)

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether `weight` (out, in) has at least the pattern's zeros in every row, group of m, or the matrix."""
        return self.surplus(weight) is not None

    def surplus(self, weight: torch.Tensor) -> int | None:
        """How many zeros `weight` (out, in) has beyond the pattern's; None where it does not hold the pattern."""
        keep = mask_of(weight)
        rows, columns = weight.shape
        if self.kind == "row":
            enough = bool((kept_of_rows(keep) <= columns - _nearest(self.sparsity * columns)).all())
        else:
            enough = self.kind == "tensor" or most_of_groups(keep, self.m) <= self.n
        surplus = keep.numel() - int(keep.count_nonzero()) - self.zeros((rows, columns))
        return surplus if surplus >= 0 and enough else None


def check_sparsity(value: float, field: str = "`sparsity`") -> float:
    """Return `value` if it is in [0, 1). **Raises** `SparsightError` otherwise; `field` begins the message."""
    if not math.isfinite(value) or not 0 <= value < 1:
        raise SparsightError(
            f"{field}: {value:g} is not a sparsity; give the fraction of zeros, from 0 to below 1, as in 0.5"
        )
    return float(value)


def keep_largest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Mark exactly the `count` largest entries of every row of `score` (rows, columns); of equal ones the lower index."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= score.shape[1]:
        return torch.ones_like(score, dtype=torch.bool)
    if (keep := kernels.keep_largest(score, count)) is not None:
        return keep
    threshold = score.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    keep = score >= threshold
    crowded = (keep.sum(1) > count).nonzero().flatten()  # rows with a tie across the threshold
    if crowded.numel():
        rows, level = score[crowded], threshold[crowded]
        above, tied = rows > level, rows == level
        room = count - above.sum(1, keepdim=True)
        keep[crowded] = above | (tied & (tied.cumsum(1) <= room))
    return keep


def keep_of_group(score: torch.Tensor, n: int) -> torch.Tensor:
    """Mark the `n` largest of the last dimension (small): rank every entry by comparing all pairs."""
    if (keep := kernels.keep_of_group(score, n)) is not None:
        return keep
    m = score.shape[-1]
    column = score.unbind(-1)
    rank = [torch.zeros_like(column[0], dtype=torch.int16) for _ in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            later_wins = column[j] > column[i]
            rank[i] += later_wins
            rank[j] += ~later_wins
    return torch.stack([r < n for r in rank], dim=-1)


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)
