"""The update of kept weights against a direct solution, and ALPS against its formulae and its rivals."""

from __future__ import annotations

import pytest
import torch

from sparsight import Pattern
from sparsight.pruning.compose import compose
from sparsight.pruning.methods.pcg import pcg
from sparsight.pruning.methods.wanda import wanda_score

from layers import case, moments_of


def solved(W, keep, G):
    """Row by row: H_kk v_k = (H w)_k for the kept columns k, in float64."""
    H = G.double() + 0.01 * G.double().diagonal().diag()
    V = torch.zeros_like(W, dtype=torch.float64)
    for row, kept in enumerate(keep):
        k = kept.nonzero().flatten()
        V[row, k] = torch.linalg.solve(H[k][:, k], (H @ W[row].double())[k])
    return V


@pytest.mark.parametrize("tokens", [300, 20], ids=["full rank", "rank-deficient"])
@pytest.mark.parametrize("pattern", [Pattern.row(0.6), Pattern.nm(2, 4)], ids=str)
def test_pcg_equals_the_direct_solution(pattern, tokens):
    W, _, moments = case(rows=40, columns=96, tokens=tokens)
    keep = pattern.keep(wanda_score(W, moments))
    expected = solved(W, keep, moments.gram)
    got = pcg(W, keep, moments, tolerance=1e-7)
    assert float((got - expected).norm() / expected.norm()) < 2e-5
    assert not got[~keep].any()
    assert float((pcg(W, keep, moments) - expected).norm() / expected.norm()) < 1e-3  # the default stops earlier


def test_pcg_by_hand():
    """Two inputs that are always equal: the kept weight takes over what the pruned one did, all but the ridge's share."""
    from sparsight.calibration.moments import Moments

    moments = Moments(2, torch.device("cpu"), with_gram=True)
    moments.add(torch.ones(10, 2))
    W = torch.tensor([[3.0, 1.0]])
    got = pcg(W, torch.tensor([[True, False]]), moments, tolerance=1e-7)
    assert got[0, 0] == pytest.approx((1.01 * 3 + 1) / 1.01, rel=1e-6)
    assert got[0, 1] == 0


def test_inputs_that_never_vary_change_nothing():
    W, X, _ = case(columns=32)
    moments = moments_of(W, torch.zeros_like(X))
    keep = Pattern.row(0.5).keep(W.abs())
    assert torch.equal(pcg(W, keep, moments), W * keep)


def alps_by_hand(W, G, pattern):
    """The published iterations, in the published orientation (in, out), float64 throughout."""
    H = G.double() + 0.01 * G.double().diagonal().diag()
    size = H.diagonal().sqrt()
    H = H / size / size[:, None]
    dense = (W.double() * size).T
    target = H @ dense

    def best(B):
        keep = pattern.keep(B.T.square().float()).T
        return B * keep, keep

    rho, B, V = 0.1, dense.clone(), torch.zeros_like(dense)
    D, support = best(dense)
    first, kept, moved = D.clone(), int(support.sum()), False
    for step in range(300):
        B = torch.linalg.solve(H + rho * torch.eye(len(H), dtype=H.dtype), target - V + rho * D)
        D, now = best(B + V / rho)
        V = V + rho * (B - D)
        if (step + 1) % 3 == 0:
            change = int((now ^ support).sum())
            support = now
            if change / kept > 0.1:
                rho, moved = rho * 1.3, True
            elif change / kept > 0.005:
                rho, moved = rho * 1.2, True
            elif change and moved:
                rho *= 1.1
            elif change:
                rho, D, V = rho / 5, first, torch.zeros_like(B)
            elif moved:
                break
            else:
                rho /= 5
            if step >= 30 and change / kept < 0.0003:
                break
    return best(B)[1].T


@pytest.mark.parametrize("pattern", [Pattern.row(0.6), Pattern.tensor(0.7), Pattern.nm(2, 4)], ids=str)
def test_alps_finds_the_support_of_the_published_iterations(pattern):
    W, _, moments = case(rows=40, columns=64, tokens=300)
    pruned = compose("alps").prune(W, moments, pattern, torch.Generator())
    support = alps_by_hand(W, moments.gram, pattern)
    assert float(((pruned != 0) != support).float().mean()) < 0.002  # float32 against float64 at near ties
    expected = solved(W, pruned != 0, moments.gram)
    assert float((pruned - expected).norm() / expected.norm()) < 0.02  # ten iterations of conjugate gradients


def error(W, pruned, X):
    return float((X @ (pruned - W).T).norm() / (X @ W.T).norm())


@pytest.mark.parametrize("steps", [{"method": "alps"}, {"update": "pcg"}, {"method": "sparsegpt"}], ids=str)
@pytest.mark.parametrize("boost", [3000, 10000])
def test_one_channel_of_massive_activations_owns_no_ridge(steps, boost):
    """Large on 1 % of the tokens; on the others the layer's error is what it is without it."""
    W, X, _ = case(rows=64, columns=128, tokens=2000)
    large, odd = X.clone(), torch.zeros(len(X), dtype=torch.bool)
    odd[::100] = True
    large[odd, 7] += boost
    d = large.square().sum(0)
    assert d.mean() / d.median() > 50
    errors = []
    for inputs in (X, large):
        moments = moments_of(W, inputs)
        pruned = compose(**steps).prune(W, moments, Pattern.row(0.6), torch.Generator())
        errors.append(error(W, pruned, X[~odd]))
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("pattern", [Pattern.row(0.5), Pattern.row(0.6), Pattern.row(0.7), Pattern.nm(2, 4)], ids=str)
def test_every_step_lowers_the_layer_s_error(pattern):
    W, X, moments = case(rows=64, columns=128, tokens=1000)

    def of(method="wanda", **steps):
        return error(W, compose(method, **steps).prune(W, moments, pattern, torch.Generator()), X)

    assert of("alps") < of("sparsegpt") < of("wanda") < of("magnitude")
    assert of(refine="swaps") < of("wanda")
    for method in ("magnitude", "wanda", "ria", "sparsegpt"):
        assert of(method, update="pcg") < of(method)
    assert of(refine="swaps", update="pcg") < of(update="pcg")
