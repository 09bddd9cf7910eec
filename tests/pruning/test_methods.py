"""Common checks over every method, refinement and update, pattern and dtype; and what each score is by its formula."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from sparsight import Pattern, SparsightError
from sparsight.calibration.moments import Moments
from sparsight.pruning.compose import compose
from sparsight.pruning.methods import METHODS, REFINES, UPDATES, Method, find_method

from layers import PATTERNS, case, moments_of

WAYS = [
    {"method": method, "refine": refine, "update": update}
    for method, refine, update in product(METHODS, [None, *REFINES], [None, *UPDATES])
    if METHODS[method].mask_only or not refine or update
]


def name(way):
    return "+".join(step for step in way.values() if step)


def run(way, W, moments, pattern, seed=0):
    choice = compose(**way) if isinstance(way, dict) else compose(way)
    return choice.prune(W, moments, pattern, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=name)
def test_common(way, pattern, dtype):
    W, _, moments = case(dtype)
    original, gram = W.clone(), moments.gram.clone()
    pruned = run(way, W, moments, pattern)
    assert torch.equal(W, original)  # the inputs are not touched
    assert torch.equal(moments.gram, gram)
    assert (pruned.shape, pruned.dtype, pruned.is_contiguous()) == (W.shape, W.dtype, True)
    assert int((pruned == 0).sum()) == pattern.zeros(tuple(W.shape))
    assert pattern.holds(pruned)
    assert torch.equal(run(way, W, moments, pattern), pruned)  # same seed, same bytes
    if compose(**way).mask_only:
        kept = pruned != 0
        assert torch.equal(pruned[kept], W[kept])  # kept weights are as they were
        if way["method"] != "random" and not way["refine"]:
            assert torch.equal(run(way, pruned, moments, pattern), pruned)  # idempotent


INPUTS = {
    "dead columns": lambda X: X.index_fill(1, torch.arange(0, X.shape[1], 3), 0),
    "all zero": torch.zeros_like,
    "constant": torch.ones_like,
    "rank one": lambda X: X[:, :1] * X[:1],
    "fewer samples than columns": lambda X: X[:5],
    "one sample": lambda X: X[:1],
    "huge": lambda X: X * 1e15,
    "tiny": lambda X: X * 1e-15,
}


@pytest.mark.parametrize("pattern", [Pattern.row(0.7), Pattern.tensor(0.6), Pattern.nm(2, 4)], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("way", WAYS, ids=name)
def test_odd_inputs_give_no_nan_and_the_exact_count(way, kind, pattern):
    W, X, _ = case()
    moments = moments_of(W, INPUTS[kind](X))
    pruned = run(way, W, moments, pattern)
    assert torch.isfinite(pruned).all()
    assert int((pruned == 0).sum()) == pattern.zeros(tuple(W.shape))
    assert pattern.holds(pruned)
    assert float(pruned.abs().max()) < 100 * float(W.abs().max())


def cut(score, count):
    """What a stable sort prunes, of the lowest scores the higher index first among equals."""
    order = score.flip(1).sort(dim=1, stable=True).indices
    return score.shape[1] - 1 - order[:, :count]


def test_wanda_is_the_formula_of_the_paper():
    W, X, moments = case()
    score = W.abs() * X.pow(2).sum(0).sqrt()
    assert torch.equal(run("wanda", W, moments, Pattern.row(0.5)), W.scatter(1, cut(score, 16), 0.0))


def test_ria_is_the_formula_of_the_paper():
    W, X, moments = case()
    size = W.abs()
    score = (size / size.sum(0) + size / size.sum(1, keepdim=True)) * X.norm(dim=0) ** 0.5
    assert torch.equal(run("ria", W, moments, Pattern.row(0.5)), W.scatter(1, cut(score, 16), 0.0))


def test_gradient_scores_are_their_formulae_and_the_published_fork_s_is_neither():
    W, _, moments = case()
    g, square = moments.sensitivity.mean, moments.sensitivity.square
    pruned = {
        "snip": W.scatter(1, cut((W * g).abs(), 16), 0.0),
        "fisher": W.scatter(1, cut(W**2 * square, 16), 0.0),
    }
    for key, expected in pruned.items():
        assert torch.equal(run(key, W, moments, Pattern.row(0.5)), expected)
    fork = W.scatter(1, cut(W**2 * g.abs(), 16), 0.0)  # W^2 |g|
    assert [int(((fork == 0) != (p == 0)).sum()) for p in pruned.values()] == [44, 32]


def test_magnitude_takes_the_absolute_value():
    """The published code of the paper ranks W itself and would remove -3 before 1."""
    W = torch.tensor([[-3.0, 1.0, 2.0, -0.5]])
    assert run("magnitude", W, None, Pattern.row(0.5)).tolist() == [[-3.0, 0.0, 2.0, 0.0]]


def test_random_depends_on_the_seed_alone():
    W, _, moments = case()
    assert not torch.equal(run("random", W, moments, Pattern.row(0.5), 1), run("random", W, moments, Pattern.row(0.5), 2))


def test_names_are_checked_with_the_nearest_choice():
    with pytest.raises(SparsightError, match=r"'wnada'; did you mean wanda\? allowed: random, magnitude, wanda"):
        find_method("wnada")


def test_a_function_is_a_method_and_may_ask_for_the_gram_matrix():
    W, _, moments = case()

    def by_curvature(W, moments, pattern, generator):
        keep = pattern.keep(W.abs().float() * moments.gram.diagonal().sqrt())
        return W.masked_fill(~keep, 0)

    mine = Method(by_curvature, needs="gram")
    pruned = compose(mine).prune(W, moments, Pattern.row(0.5), torch.Generator())
    assert torch.allclose(pruned, run("wanda", W, moments, Pattern.row(0.5)))
    assert compose(mine).needs == {"gram"}
    with pytest.raises(SparsightError, match=r"cannot need 'grams'; did you mean gram\?"):
        Method(by_curvature, needs="grams")
    plain = Moments(32, W.device)
    plain.add(torch.ones(3, 32))
    with pytest.raises(ValueError, match=r"needs='gram'"):
        compose(by_curvature).prune(W, plain, Pattern.row(0.5), torch.Generator())
