"""Swaps: exchange one kept and one pruned weight of a row as long as that lowers the row's output error (SparseSwaps,
arXiv 2512.10922).

With d the pruned part of a row w, the error on the calibration inputs is d G d^T for their Gram matrix G. With c = G d,
pruning the kept weight p and restoring the pruned weight q changes it by

    2 w_p c_p + w_p^2 G_pp - 2 w_q c_q + w_q^2 G_qq - 2 w_p w_q G_pq,

and every cycle takes the best pair of every row. The best pair is exact: since |G_pq| <= sqrt(G_pp G_qq) no pair lies
below 2 (w_p c_p - w_q c_q), so that the pairs of the first few p and q by those terms are enough unless another pair
could still be better; such rows are searched in full. With n:m both weights are of one group. A compiled kernel
does the same where there is a compiler.
"""

from __future__ import annotations

import torch

from sparsight import kernels
from sparsight.calibration.moments import Moments
from sparsight.masks.pattern import Pattern

CYCLES = 100
NARROW = 32  # candidates of each kind that are searched first
LEAST = 1e-6  # of a row's error: smaller gains are rounding
CHUNK = 2**24  # pairs in memory at a time


def swaps(W: torch.Tensor, keep: torch.Tensor, moments: Moments, pattern: Pattern) -> torch.Tensor:
    """Return another mask (out, in) with a smaller error d G d^T per row; counts per row and group stay. Needs the Gram."""
    if W.shape[1] < 2:
        return keep.clone()
    G = moments.gram / moments.gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)  # (in, in)
    lost = torch.where(keep, 0, W.float())
    c = lost @ G  # (out, in)
    floor = LEAST * (c * lost).sum(1)
    swapped = kernels.swap_rows(W, keep, G, c, floor, pattern.m if pattern.kind == "n:m" else 0, CYCLES)
    if swapped is not None:
        return swapped
    width = pattern.m**2 * (W.shape[1] // pattern.m) if pattern.kind == "n:m" else 4 * NARROW**2 + 8 * W.shape[1]
    each = max(1, CHUNK // max(1, width))
    parts = zip(W.float().split(each), keep.clone().split(each), c.split(each), floor.split(each), strict=True)
    return torch.cat([_refine(*part, G, pattern) for part in parts])


def _refine(
    W: torch.Tensor, keep: torch.Tensor, c: torch.Tensor, floor: torch.Tensor, G: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    best = _best_of_groups if pattern.kind == "n:m" else _best_of_row
    active = torch.arange(len(W), device=W.device)
    for _ in range(CYCLES):
        w, k, now = W[active], keep[active], c[active]
        change, p, q = best(w, k, now, G, pattern)
        better = change < -floor[active]
        if not bool(better.any()):
            break
        active, p, q, w = active[better], p[better], q[better], w[better]
        rows = torch.arange(len(active), device=W.device)
        keep[active, p], keep[active, q] = False, True
        c[active] += w[rows, p].unsqueeze(1) * G[p] - w[rows, q].unsqueeze(1) * G[q]
    return keep


Best = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (rows,) change of the error, column out, column in


def _best_of_row(w: torch.Tensor, keep: torch.Tensor, c: torch.Tensor, G: torch.Tensor, pattern: Pattern) -> Best:
    term, infinite = w * c, float("inf")
    out = term.masked_fill(~keep, infinite)
    back = term.masked_fill(keep | (w == 0), -infinite)  # a weight that is zero cannot come back
    width = min(NARROW, w.shape[1] - 1)
    outs, p = out.topk(width + 1, dim=1, largest=False)
    backs, q = back.topk(width + 1, dim=1)
    change, i, j = _best_pair(w, c, G, p[:, :width], q[:, :width], keep)
    beyond = 2 * torch.minimum(outs[:, width] - backs[:, 0], outs[:, 0] - backs[:, width])
    p, q = p.gather(1, i).squeeze(1), q.gather(1, j).squeeze(1)
    unsure = (beyond < change).nonzero().flatten()  # a pair beyond the first few may be better
    every = torch.arange(w.shape[1], device=w.device)
    for rows in unsure.split(max(1, CHUNK // w.shape[1] ** 2)):
        all_ = every.expand(len(rows), -1)
        change[rows], a, b = _best_pair(w[rows], c[rows], G, all_, all_, keep[rows])
        p[rows], q[rows] = a[:, 0], b[:, 0]
    return change, p, q


def _best_pair(
    w: torch.Tensor, c: torch.Tensor, G: torch.Tensor, p: torch.Tensor, q: torch.Tensor, keep: torch.Tensor
) -> Best:
    """Return the best of all pairs of candidates p (rows, a) and q (rows, b) as places in them, (rows, 1) each."""
    wp, wq, diagonal = w.gather(1, p), w.gather(1, q), G.diagonal()
    a = (2 * wp * c.gather(1, p) + wp.square() * diagonal[p]).masked_fill(~keep.gather(1, p), float("inf"))
    b = (wq.square() * diagonal[q] - 2 * wq * c.gather(1, q)).masked_fill(keep.gather(1, q) | (wq == 0), float("inf"))
    change = a.unsqueeze(2) + b.unsqueeze(1) - 2 * wp.unsqueeze(2) * wq.unsqueeze(1) * G[p.unsqueeze(2), q.unsqueeze(1)]
    least, place = change.flatten(1).min(1)
    return least, (place // q.shape[1]).unsqueeze(1), (place % q.shape[1]).unsqueeze(1)


def _best_of_groups(w: torch.Tensor, keep: torch.Tensor, c: torch.Tensor, G: torch.Tensor, pattern: Pattern) -> Best:
    m, infinite = pattern.m, float("inf")
    groups = w.shape[1] // m
    diagonal = G.diagonal()
    a = (2 * w * c + w.square() * diagonal).masked_fill(~keep, infinite).view(-1, groups, m)
    b = (w.square() * diagonal - 2 * w * c).masked_fill(keep | (w == 0), infinite).view(-1, groups, m)
    place = torch.arange(groups * m, device=w.device).view(groups, m)
    inner = G[place.unsqueeze(2), place.unsqueeze(1)]  # (groups, m, m)
    v = w.view(-1, groups, m)
    change = a.unsqueeze(3) + b.unsqueeze(2) - 2 * v.unsqueeze(3) * v.unsqueeze(2) * inner
    least, at = change.flatten(1).min(1)
    group, pair = at // (m * m), at % (m * m)
    return least, group * m + pair // m, group * m + pair % m
