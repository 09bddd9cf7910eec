"""SparseGPT: parity with the paper's column loop, exact counts, inputs of every kind; compiled kernel and plain torch."""

from __future__ import annotations

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from sparsight import Pattern, SparsightError, kernels
from sparsight.calibration.inverse_factor import inverse_factor
from sparsight.pruning.methods.sparsegpt import sparsegpt

COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
PATTERNS = [
    Pattern.row(0.5),
    Pattern.row(0.37),
    Pattern.tensor(0.5),
    Pattern.tensor(0.7),
    Pattern.nm(2, 4),
    Pattern.nm(4, 8),
]


@pytest.fixture(params=["kernel", "torch"])
def way(request, monkeypatch):
    """Run a test with the compiled kernels and with plain torch."""
    if request.param == "torch":
        monkeypatch.setenv("SPARSIGHT_KERNELS", "0")
    elif kernels.load() is None:
        pytest.skip("no C++ compiler")
    return request.param


def inputs(columns=304, tokens=900, seed=0):
    """Correlated inputs whose columns differ in size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    return torch.randn(tokens, columns, generator=g) @ mix * torch.rand(columns, generator=g).add(0.1)


def moments_of(X):
    gram = X.T @ X
    return SimpleNamespace(gram=gram, count=len(X), inverse_factor=lambda: inverse_factor(gram)[0])


def weights(rows=70, columns=304, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def usual(diagonal):
    """The mean diagonal without what massive activations add to it."""
    live = diagonal[diagonal > 0]
    return live.clamp(max=10 * live.median()).mean()


def reference(W, gram, pattern, damp=0.01):
    """The paper's algorithm in float64 with its explicit inverse; selection by rank, damping by the usual diagonal."""
    W, H = W.double().clone(), gram.double().clone()
    rows, columns = W.shape
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    H.diagonal().add_(damp * (H.diagonal() / 10).clamp(min=usual(H.diagonal())))
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for i1 in range(0, columns, 128):
        i2 = min(i1 + 128, columns)
        error, mask = torch.zeros(rows, i2 - i1).double(), torch.zeros(rows, i2 - i1, dtype=torch.bool)
        score = W[:, i1:i2] ** 2 / U.diagonal()[i1:i2] ** 2
        if pattern.kind == "tensor":
            count = pattern.zeros((rows, i2)) - pattern.zeros((rows, i1))
            mask.view(-1)[score.flatten().sort(stable=True).indices[:count]] = True
        elif pattern.kind == "row":
            count = pattern.zeros((1, i2)) - pattern.zeros((1, i1))
            mask.scatter_(1, score.sort(dim=1, stable=True).indices[:, :count], True)
        for i in range(i1, i2):
            if pattern.kind == "n:m" and i % pattern.m == 0:
                score = W[:, i : i + pattern.m] ** 2 / U.diagonal()[i : i + pattern.m] ** 2
                lowest = score.sort(dim=1, stable=True).indices[:, : pattern.m - pattern.n]
                mask.scatter_(1, i - i1 + lowest, True)
            q = W[:, i].masked_fill(mask[:, i - i1], 0)
            error[:, i - i1] = (W[:, i] - q) / U[i, i]
            W[:, i:i2] -= error[:, i - i1, None] * U[i, i:i2]
            W[:, i] = q
        W[:, i2:] -= error @ U[i1:i2, i2:]
    return W


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_and_weights_are_those_of_the_column_loop(pattern, way):
    W, moments = weights(), moments_of(inputs())
    ours, theirs = sparsegpt(W, moments, pattern, None), reference(W, moments.gram, pattern)
    assert torch.equal(ours == 0, theirs == 0)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not torch.equal(ours[ours != 0], W[ours != 0])  # the kept weights did make up for the errors


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_error_of_the_outputs_is_clearly_below_wanda(pattern, way):
    W, X = weights(), inputs()
    ours = sparsegpt(W, moments_of(X), pattern, None)
    wanda = W * pattern.keep(W.abs() * X.norm(dim=0))
    assert (X @ (ours - W).T).norm() < 0.92 * (X @ (wanda - W).T).norm()


def test_the_published_threshold_prunes_one_too_many_per_block():
    """`score <= sorted[int(n * sparsity)]` counts the threshold itself; 3 blocks of 40 rows, half of 128 + 128 + 48."""
    W, pattern = weights(rows=40), Pattern.tensor(0.5)
    published = 0
    for block in W.abs().split(128, dim=1):
        threshold = block.flatten().sort().values[int(block.numel() * 0.5)]
        published += int((block <= threshold).sum())
    assert published == 6083
    assert int((sparsegpt(W, moments_of(inputs()), pattern, None) == 0).sum()) == 6080


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern.nm(1, 2), Pattern.nm(3, 5), Pattern.row(0.0)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(70, 304), (3, 40), (129, 120)])
def test_counts_are_exact_and_the_input_is_not_touched(dtype, pattern, rows, columns, way):
    if pattern.kind == "n:m" and columns % pattern.m:
        columns = columns // pattern.m * pattern.m
    W = weights(rows, columns).to(dtype)
    original, moments = W.clone(), moments_of(inputs(columns))
    pruned = sparsegpt(W, moments, pattern, None)
    assert torch.equal(W, original)
    assert (pruned.shape, pruned.dtype, pruned.is_contiguous()) == (W.shape, dtype, True)
    assert int((pruned == 0).sum()) == pattern.zeros((rows, columns))
    assert pattern.holds(pruned)
    if pattern.kind == "row":
        assert (pruned == 0).sum(1).unique().tolist() == [pattern.zeros((1, columns))]
    assert torch.equal(sparsegpt(W, moments, pattern, None), pruned)
    assert torch.equal(sparsegpt(pruned, moments, pattern, None), pruned)  # idempotent


@COMPILER
@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern.nm(1, 2)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (33, 120), (200, 400)])
def test_kernel_and_plain_torch_agree(pattern, rows, columns, monkeypatch):
    W, moments = weights(rows, columns), moments_of(inputs(columns))
    kernel = sparsegpt(W, moments, pattern, None)
    monkeypatch.setenv("SPARSIGHT_KERNELS", "0")
    plain = sparsegpt(W, moments, pattern, None)
    assert torch.equal(kernel == 0, plain == 0)
    torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-6)


@COMPILER
@pytest.mark.parametrize("pattern", [Pattern.tensor(0.5), Pattern.row(0.5), Pattern.nm(2, 4)], ids=str)
def test_the_number_of_threads_changes_no_bit(pattern):
    W, moments, threads = weights(700, 256), moments_of(inputs(256)), torch.get_num_threads()
    U = moments.inverse_factor()
    moments.inverse_factor = lambda: U
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(sparsegpt(W, moments, pattern, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern.row(0.2), Pattern.tensor(0.2)], ids=str)
def test_dead_columns_go_first(pattern, way):
    X = inputs()
    X[:, ::3] = 0
    W = weights()
    W[:, ::3] *= 100  # large, and yet of no use
    pruned = sparsegpt(W, moments_of(X), pattern, None)
    assert torch.isfinite(pruned).all()
    assert int((pruned == 0).sum()) == pattern.zeros(tuple(W.shape))
    dead = pruned[:, ::3]
    if pattern.sparsity > 0.34:  # a third is dead: all of that goes
        assert not dead.any()
    else:  # nothing else goes
        assert int((dead == 0).sum()) == pattern.zeros(tuple(W.shape))
        assert torch.equal(pruned, W.masked_fill(pruned == 0, 0))
    assert torch.equal(sparsegpt(pruned, moments_of(X), pattern, None) == 0, pruned == 0)


@pytest.mark.parametrize("size", [0.0, 1e-15, 1.0, 1e15], ids="inputs of {:g}".format)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_inputs_of_any_size(size, pattern, way):
    """Their squares are 1e30 and 1e-30; the masks do not depend on the unit of the inputs."""
    W, X = weights(), inputs()
    pruned = sparsegpt(W, moments_of(X * size), pattern, None)
    assert torch.isfinite(pruned).all()
    assert int((pruned == 0).sum()) == pattern.zeros(tuple(W.shape))
    if size:
        plain = sparsegpt(W, moments_of(X), pattern, None)
        assert ((pruned == 0) != (plain == 0)).float().mean() < 1e-3  # their last bits do
    else:  # nothing to make up for: the weights stay, and go by magnitude
        assert torch.equal(pruned, W.masked_fill(pruned == 0, 0))
        assert torch.equal(pruned[:, :128], W[:, :128] * pattern.keep(W[:, :128].abs()))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_fewer_tokens_than_columns(tokens, pattern, way):
    W, X = weights(), inputs(tokens=tokens)
    pruned = sparsegpt(W, moments_of(X), pattern, None)
    assert int((pruned == 0).sum()) == pattern.zeros(tuple(W.shape))
    assert (X @ (pruned - W).T).norm() < 0.5 * (X @ (W * pattern.keep(W.abs()) - W).T).norm()


def test_constant_inputs(way):
    W = weights()
    pruned = sparsegpt(W, moments_of(torch.ones(50, 304)), Pattern.row(0.5), None)
    assert int((pruned == 0).sum()) == Pattern.row(0.5).zeros((70, 304))
    assert (pruned.sum(1) - W.sum(1)).abs().max() < 0.1 * W.sum(1).abs().max()  # what these inputs see of the weights


def test_an_n_m_that_does_not_fit_and_weights_that_are_not_numbers_are_refused():
    with pytest.raises(SparsightError, match="not a multiple of 8"):
        sparsegpt(weights(columns=300), moments_of(inputs(300)), Pattern.nm(4, 8), None)
    W = weights()
    W[3, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        sparsegpt(W, moments_of(inputs()), Pattern.row(0.5), None)


@pytest.mark.parametrize("columns", [1, 2, 100, 128, 129, 513])
def test_the_factor_is_that_of_the_inverse(columns):
    X = inputs(columns)
    gram = X.T @ X
    original = gram.clone()
    U, damping = inverse_factor(gram)
    assert torch.equal(gram, original)
    assert damping == 0.01
    assert U.tril(-1).abs().max() == 0
    d = gram.double().diagonal()
    damped = gram.double() + 0.01 * (d / 10).clamp(min=usual(d)).diag()
    product = (U.double().T @ U.double()) @ damped
    torch.testing.assert_close(product, torch.eye(columns).double(), rtol=0, atol=1e-4)


def test_the_factor_by_hand():
    """diag(3, 0, 1): live mean 2, which the dead column counts as; damping of half of it."""
    U, _ = inverse_factor(torch.diag(torch.tensor([3.0, 0.0, 1.0])), damp=0.5)
    torch.testing.assert_close(U, torch.diag(torch.tensor([1 / 4, 1 / 3, 1 / 2])).sqrt())


def test_the_factor_by_hand_where_one_column_owns_the_mean():
    """diag(1, 1, 1000): ten medians at most, so m = 4; damping of half of it, and of half of 100 for the large one."""
    U, _ = inverse_factor(torch.diag(torch.tensor([1.0, 1.0, 1000.0])), damp=0.5)
    torch.testing.assert_close(U, torch.diag(torch.tensor([1 / 3, 1 / 3, 1 / 1050])).sqrt())


def test_a_damping_that_was_raised_is_reported():
    v = torch.ones(8) / 8**0.5
    gram = torch.eye(8) - 1.05 * torch.outer(v, v)  # the eigenvalue along v is -0.05, the mean diagonal 0.869
    U, damping = inverse_factor(gram)
    assert damping == pytest.approx(0.1)
    torch.testing.assert_close(U.T @ U @ (gram + damping * gram.diagonal().mean() * torch.eye(8)), torch.eye(8))


def test_what_is_no_gram_matrix_is_refused():
    gram = torch.eye(4)
    gram[0, 1] = gram[1, 0] = 50.0
    with pytest.raises(ValueError, match=r"damped by 0\.01, 0\.1, 1, 10 times its mean diagonal"):
        inverse_factor(gram)
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_factor(-torch.eye(4))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            inverse_factor(torch.full((4, 4), value))


def test_without_a_compiler_plain_torch_runs(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    kernels.load.cache_clear()
    W, moments = weights(), moments_of(inputs())
    try:
        with caplog.at_level(logging.INFO, logger="sparsight"):
            pruned = sparsegpt(W, moments, Pattern.nm(2, 4), None)
        assert kernels.load() is None
    finally:
        kernels.load.cache_clear()
    assert [record.message for record in caplog.records] == [
        "no compiled kernels, plain torch runs instead: no C++ compiler (g++, c++ or $CXX)"
    ]
    assert torch.equal(pruned == 0, reference(W, moments.gram, Pattern.nm(2, 4)) == 0)
