"""DSnoT step for step, swaps against an exhaustive search, both against their start."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from sparsight import Pattern, anatomy
from sparsight.allocation.plan import make_plan
from sparsight.errors import Notice
from sparsight.pruning.loop import prune
from sparsight.pruning.methods import REFINES
from sparsight.pruning.methods.dsnot import dsnot
from sparsight.pruning.methods.swaps import swaps
from sparsight.pruning.methods.wanda import wanda_score

import zoo
from layers import PATTERNS, case
from walks import calibration


def dsnot_by_hand(W, X, keep, sequences, m=0):
    """The paper's algorithm, one row and one swap at a time; a row ends where a swap would change the sign of its error."""
    W, X = W.numpy(), X.numpy()
    out = keep.numpy().copy()
    mean, variance = X.sum(0) / np.float32(sequences), X.var(0)
    score = np.abs(W) * np.sqrt((X**2).sum(0))
    for w, kept, s in zip(W, out, score, strict=True):
        part = (w * mean).astype(np.float32)
        error = part[~kept].sum(dtype=np.float32)
        sign = np.sign(error)
        grow = list(np.argsort(np.where(kept, 0, part / variance), kind="stable"))
        line = [j for j in np.argsort(s, kind="stable") if kept[j]]
        line = [j for j in line if part[j] < 0] + [j for j in line if part[j] >= 0][::-1]
        gone, back = set(), set()
        for _ in range(50):
            q = grow.pop() if error > 0 else grow.pop(0)
            options = [j for j in range(q - q % m, q - q % m + m) if kept[j] and j not in gone | back] if m else line
            if kept[q] or not options:
                break
            p = min(options, key=lambda j, s=s: s[j]) if m else line.pop() if error < 0 else line.pop(0)
            gone.add(p)
            after = error + part[p] - part[q]
            if abs(error) <= 0.1 or np.sign(after) != sign:
                break
            kept[q], kept[p], error = True, False, after
            back.add(q)
    return torch.from_numpy(out)


@pytest.mark.parametrize("pattern", [Pattern.row(0.5), Pattern.row(0.7), Pattern.nm(2, 4), Pattern.nm(4, 8)], ids=str)
def test_dsnot_equals_the_paper_s_steps(pattern):
    W, X, moments = case(rows=64, columns=128, tokens=300)
    keep = pattern.keep(wanda_score(W, moments))
    got = dsnot(W, keep, moments, pattern)
    assert torch.equal(got, dsnot_by_hand(W, X, keep, 5, pattern.m))
    assert pattern.holds(W * got)


def test_dsnot_changes_masks_where_the_published_fork_changes_none():
    """The VLM paper's code swaps nothing; the original moves about a tenth of the mask."""
    W, _, moments = case(rows=64, columns=128, tokens=300)
    pattern = Pattern.row(0.6)
    keep = pattern.keep(wanda_score(W, moments))
    changed = (dsnot(W, keep, moments, pattern) != keep).float().mean()
    assert 0.02 < float(changed) < 0.2


@pytest.mark.parametrize("name", zoo.NAMES)
def test_dsnot_refines_attention_and_no_other_layer(name):
    """The published default; `dsnot-all` refines every layer."""
    found = {}
    for refine in (None, "dsnot", "dsnot-all"):
        model, processor = zoo.build(name)
        body = anatomy(model)
        plan = make_plan(body, sparsity=0.6)
        prune(model, body, plan, calibration(model, processor), refine=refine, propagate="dense")
        found[refine] = {x.name: (x.weight != 0, x.attention) for x in body.layers if x.name in plan}
    plain = found[None]
    moved = {name for name, (keep, _) in found["dsnot"].items() if not torch.equal(keep, plain[name][0])}
    everywhere = {name for name, (keep, _) in found["dsnot-all"].items() if not torch.equal(keep, plain[name][0])}
    assert moved
    assert moved == {name for name in everywhere if plain[name][1]}
    assert everywhere > moved


def loss(W, keep, G):
    lost = torch.where(keep, 0, W).double()
    return ((lost @ G.double()) * lost).sum(1)


@pytest.fixture(params=["compiled", "plain torch"])
def kernels(request, monkeypatch):
    """Both ways of doing it."""
    from sparsight import kernels

    if request.param == "plain torch":
        monkeypatch.setenv("SPARSIGHT_KERNELS", "0")
    elif kernels.load() is None:
        pytest.skip("no compiler here")


@pytest.mark.parametrize("pattern", [Pattern.row(0.5), Pattern.nm(2, 4)], ids=str)
@pytest.mark.usefixtures("kernels")
def test_swaps_end_where_no_exchange_helps(pattern):
    """Exhaustively: of every row, every kept against every pruned weight (of its group)."""
    W, _, moments = case(rows=6, columns=16)
    G = moments.gram
    keep = swaps(W, pattern.keep(W.abs()), moments, pattern)
    best = loss(W, keep, G)
    for row in range(len(W)):
        for p in keep[row].nonzero().flatten().tolist():
            for q in (~keep[row]).nonzero().flatten().tolist():
                if pattern.m and p // pattern.m != q // pattern.m:
                    continue
                other = keep.clone()
                other[row, p], other[row, q] = False, True
                assert loss(W, other, G)[row] > best[row] * (1 - 1e-5)


@pytest.mark.usefixtures("kernels")
def test_the_first_swap_is_the_best_of_all(monkeypatch):
    """One cycle takes the best pair, also where it lies beyond the first candidates."""
    module = sys.modules["sparsight.pruning.methods.swaps"]

    W, _, moments = case(rows=40, columns=64, seed=3)
    G, pattern = moments.gram, Pattern.row(0.5)
    start = pattern.keep(W.abs())
    monkeypatch.setattr(module, "CYCLES", 1)
    found = {}
    for narrow in (1, 32):
        monkeypatch.setattr(module, "NARROW", narrow)
        found[narrow] = swaps(W, start, moments, pattern)
    before = loss(W, start, G)
    for row in range(len(W)):
        kept, pruned = start[row].nonzero().flatten(), (~start[row]).nonzero().flatten()
        options = start[row].repeat(len(kept) * len(pruned), 1)
        p, q = torch.cartesian_prod(kept, pruned).T
        options[torch.arange(len(p)), p], options[torch.arange(len(p)), q] = False, True
        best = float(loss(W[row].expand_as(options), options, G).min())
        for keep in found.values():
            assert float(loss(W, keep, G)[row]) == pytest.approx(min(best, float(before[row])), rel=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("refine", [dsnot, swaps], ids=["dsnot", "swaps"])
@pytest.mark.usefixtures("kernels")
def test_rows_and_groups_keep_their_counts(refine, pattern):
    W, _, moments = case(rows=24, columns=64)
    keep = pattern.keep(wanda_score(W, moments))
    got = refine(W, keep, moments, pattern)
    assert torch.equal(got.sum(1), keep.sum(1))
    assert bool((got != keep).any())
    if pattern.m:
        assert torch.equal(got.view(24, -1, pattern.m).sum(2), keep.view(24, -1, pattern.m).sum(2))
    if refine is swaps:
        assert bool((loss(W, got, moments.gram) <= loss(W, keep, moments.gram) * (1 + 1e-6)).all())


@pytest.mark.parametrize("pattern", [Pattern.row(0.6), Pattern.nm(1, 4)], ids=str)
@pytest.mark.parametrize("refine", [dsnot, swaps], ids=["dsnot", "swaps"])
@pytest.mark.usefixtures("kernels")
def test_a_weight_that_is_zero_already_does_not_come_back(refine, pattern):
    W, _, moments = case(rows=24, columns=64)
    W = W * Pattern.nm(2, 4).keep(W.abs())
    keep = pattern.keep(wanda_score(W, moments)) & (W != 0)
    got = refine(W, keep, moments, pattern)
    assert not bool((got & (W == 0)).any())
    assert torch.equal(got.sum(1), keep.sum(1))


def test_swaps_that_would_take_hours_are_said(monkeypatch, recwarn):
    """Four layers of 4,096 x 4,096 would take an hour and a half of one core; here the limit is lowered."""
    assert REFINES["swaps"].seconds(2048, 2048) == pytest.approx(2048 * 0.092, rel=0.1)
    assert 3600 < 4 * REFINES["swaps"].seconds(4096, 4096) < 7200
    monkeypatch.setattr(sys.modules["sparsight.pruning.loop"], "LONG", 1e-3)
    model, processor = zoo.build("llava")
    body, ready = anatomy(model), calibration(model, processor)
    with pytest.warns(Notice, match=r"`refine`: without groups .* hours of one CPU core"):
        prune(model, body, make_plan(body, sparsity=0.5), ready, refine="swaps")
    recwarn.clear()
    prune(model, body, make_plan(body, pattern="2:4"), ready, refine="swaps")
    assert not recwarn.list


@pytest.mark.usefixtures("kernels")
def test_a_single_column_has_nothing_to_swap():
    W, _, moments = case(rows=4, columns=1)
    keep = torch.ones(4, 1, dtype=torch.bool)
    assert torch.equal(swaps(W, keep, moments, Pattern.row(0.0)), keep)
