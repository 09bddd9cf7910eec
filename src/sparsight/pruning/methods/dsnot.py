"""DSnoT, dynamic sparse no training: grow back one pruned weight of a row and prune one kept one, so that the row's
expected output error shrinks (Zhang et al., arXiv 2310.08915; code zyxxmu/DSnoT).

The error of a row is e = sum over its pruned weights of W_ij E[x_j]. While |e| > 0.1, and for at most 50 swaps, the
pruned weight with the largest W_ij E[x_j] / Var[x_j] on e's side is restored, and the kept weight of the smallest Wanda
score whose loss moves e towards 0 is pruned; the row stops as soon as a swap would change e's sign. With n:m the latter is
the smallest of the same group. E[x] is the sum over tokens per calibration sequence, as published.

As in the published defaults, `dsnot` refines the layers of attention and leaves all others; `dsnot-all` refines every layer.

Ours differs in four places. The published code looks at the sign with n:m, and by default not in rows, where a swap may then
lead past 0; ours stops there, too, since layers' errors grow without it. A row without candidates stops, where the published
code goes on with weights that are not pruned and so changes the count. Var[x] is that of all tokens, where the published
code averages the batches' variances; on one batch the masks are equal. And it refines any mask. The VLM paper's fork changes
no mask entry at all.
"""

from __future__ import annotations

import torch

from sparsight.calibration.moments import Moments
from sparsight.masks.pattern import Pattern
from sparsight.pruning.methods.wanda import wanda_score

CYCLES = 50
THRESHOLD = 0.1


def dsnot(W: torch.Tensor, keep: torch.Tensor, moments: Moments, pattern: Pattern) -> torch.Tensor:
    """Return another mask (out, in) with a smaller |sum over pruned W_ij E[x_j]| per row; counts per row and group stay."""
    keep = keep.clone()
    part = W.float() * (moments.sums / max(1, moments.sequences))  # (out, in) mean output of each weight
    grow = torch.where(keep, 0, part) / moments.variance.clamp(min=torch.finfo(torch.float32).tiny)
    order = grow.sort(dim=1, stable=True).indices  # ascending: from the right for positive errors, from the left else
    error = torch.where(keep, 0, part).sum(1)  # (out,)
    sign = error.sign()
    shrink = _Smallest(W, keep, part, moments, pattern)
    left = torch.zeros_like(error, dtype=torch.long)
    right = torch.full_like(left, W.shape[1] - 1)
    rows = torch.arange(len(W), device=W.device)
    active = torch.ones_like(keep[:, 0])
    for _ in range(CYCLES):
        up = error > 0
        grown = order[rows, torch.where(up, right, left).clamp(0, W.shape[1] - 1)]
        pruned, there = shrink.next(error, grown)
        after = error + part[rows, pruned] - part[rows, grown]
        active &= (error.abs() > THRESHOLD) & (after.sign() == sign)
        active &= ~keep[rows, grown] & keep[rows, pruned] & there & (W[rows, grown] != 0)
        if not bool(active.any()):
            break
        keep[rows[active], grown[active]] = True
        keep[rows[active], pruned[active]] = False
        error = torch.where(active, after, error)
        left, right = torch.where(up, left, left + 1), torch.where(up, right - 1, right)
    return keep


class _Smallest:
    """Finds the kept weight of each row that is pruned next."""

    def __init__(self, W: torch.Tensor, keep: torch.Tensor, part: torch.Tensor, moments: Moments, pattern: Pattern) -> None:
        self.m = pattern.m if pattern.kind == "n:m" else 0
        self.score = wanda_score(W, moments).masked_fill(~keep, float("inf"))  # (out, in)
        self.rows = torch.arange(len(W), device=W.device)
        if not self.m:
            order = self.score.sort(dim=1, stable=True).indices
            self.kept = keep.sum(1)
            # negative parts first, by rising score; then the others, by falling score: an end of the list for each sign
            place = torch.arange(W.shape[1], device=W.device).expand_as(order)
            sorted_part = part.gather(1, order)
            size = W.shape[1]
            key = torch.where(sorted_part < 0, place, 2 * size - place)
            key = key.masked_fill(place >= self.kept.unsqueeze(1), 3 * size)
            self.order = order.gather(1, key.argsort(dim=1))
            self.first, self.last = torch.zeros_like(self.kept), self.kept - 1

    def next(self, error: torch.Tensor, grown: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the column to prune in each row (out,), and whether there is one."""
        if self.m:
            start = grown - grown % self.m
            group = start.unsqueeze(1) + torch.arange(self.m, device=grown.device)
            score = self.score.gather(1, group)
            pruned = start + score.argmin(1)
            there = self.score[self.rows, pruned].isfinite()
            self.score[self.rows, pruned] = float("inf")
            return pruned, there
        down = error < 0
        at = torch.where(down, self.last, self.first)
        there = (self.first <= self.last) & (at >= 0)
        self.first, self.last = torch.where(down, self.first, self.first + 1), torch.where(down, self.last - 1, self.last)
        return self.order[self.rows, at.clamp(0, self.order.shape[1] - 1)], there
