"""The kernels of SparseLoRA, in C++ and in Triton, against the plain expressions; how masks are packed.

The tests run on the CPU in C++, in a process of their own under Triton's interpreter, and marked `gpu` on CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from sparsight import kernels
from sparsight.kernels import adapt, build
from sparsight.masks.bits import pack, unpack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILER = bool(shutil.which("g++") or shutil.which("c++"))
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not (COMPILER or INTERPRETED), reason="no C++ compiler"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (17, 33), (65, 70), (5, 259)] + ([] if INTERPRETED else [(128, 128), (33, 1000)])
RANKS = [1, 16, 20] if INTERPRETED else [1, 2, 3, 4, 8, 16, 20]
NEAR = 1e-6  # float32 rounding of a sum, relative to the sum of its terms' sizes

pytestmark = pytest.mark.skipif(INTERPRETED and not find_spec("triton"), reason="no Triton")


@pytest.fixture(params=[CPU, CUDA])
def device(request):
    if INTERPRETED or request.param == "cuda":
        assert adapt._load_triton(torch.device(request.param)) is not None
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def case(shape, rank, dtype, device, poison=None):
    """W, A, B and a mask; `poison` stands in W where the mask is 0."""
    g = torch.Generator().manual_seed(rank)
    W, A, B = (
        torch.randn(shape, generator=g),
        torch.randn(rank, shape[1], generator=g),
        torch.randn(shape[0], rank, generator=g),
    )
    mask = torch.rand(shape, generator=g) < 0.5
    if poison is not None:
        W[~mask] = poison
    return W.to(dtype).to(device), A.to(device) * 0.3, B.to(device) * 0.3, mask.to(device)


def assert_rounded(found, exact, size):
    """`found` is the rounding of what lies within NEAR * size of the float64 `exact`; exactly +0 where size is 0."""
    room = NEAR * size
    if INTERPRETED and found.dtype == torch.bfloat16:
        room = room + exact.abs() * 2**-7  # the interpreter cuts bfloat16 off instead of rounding it
    low, high = ((exact + sign * room).float().to(found.dtype) for sign in (-1, 1))
    assert bool(((low <= found) & (found <= high)).all())
    assert not bool(found[size == 0].signbit().any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("times", [False, True], ids=["plus", "times"])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_merging_is_one_expression_rounded_once(masked, times, rank, dtype, device):
    for shape in SHAPES:
        W, A, B, mask = case(shape, rank, dtype, device, float("nan") if masked else None)
        E = kernels.merge(W, A, B, 1.7, pack(mask) if masked else None, times=times)
        keep = mask if masked else torch.ones_like(mask)
        w, change, largest = W.double(), 1.7 * B.double() @ A.double(), 1.7 * B.double().abs() @ A.double().abs()
        exact, size = (w * (1 + change), w.abs() * (1 + largest)) if times else (w + change, w.abs() + largest)
        assert E.dtype == dtype
        assert E.is_contiguous()
        assert_rounded(E, exact.masked_fill(~keep, 0), size.masked_fill(~keep, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merged_weights_are_torchs_own_bits_but_at_a_tie(dtype, device):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bfloat16 off")
    W, A, B, mask = case((300, 257), 16, dtype, device)
    plain = torch.addmm(W.float(), B, A, alpha=0.5).masked_fill(~mask, 0).to(dtype)
    E = kernels.merge(W, A, B, 0.5, pack(mask))
    assert float((plain != E).double().mean()) <= 1e-3
    assert bool(((E.view(torch.int16).int() - plain.view(torch.int16).int()).abs() <= 1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("times", [False, True], ids=["plus", "times"])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_projected_gradients_see_only_what_is_kept(masked, times, rank, dtype, device):
    for shape in SHAPES:
        W, A, B, mask = case(shape, rank, dtype, device, float("nan") if masked else None)
        dE, *_ = case(shape, 100 + rank, dtype, device)
        if masked:
            dE[~mask] = float("inf")
        found = kernels.project(dE, A, B, 1.7, pack(mask) if masked else None, W=W if times else None)
        D = dE.double() * W.double() if times else dE.double()
        D = D.masked_fill(~mask, 0) if masked else D
        a, b = A.double(), B.double()
        exact = 1.7 * b.T @ D, 1.7 * D @ a.T
        sizes = 1.7 * b.abs().T @ D.abs(), 1.7 * D.abs() @ a.abs().T
        for one, right, size in zip(found, exact, sizes, strict=True):
            assert one.dtype == torch.float32
            assert bool(((one - right).abs() <= NEAR * size).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_expanded_and_compressed_in_order(dtype, device):
    for shape in [*SHAPES, (3, 70, 33)]:
        g = torch.Generator().manual_seed(0)
        mask, dE = torch.rand(shape, generator=g) < 0.3, torch.randn(shape, generator=g).to(dtype)
        values, dE = torch.randn(int(mask.sum()), generator=g).to(device), dE.masked_fill(~mask, float("nan")).to(device)
        mask = mask.to(device)
        E = kernels.expand(values, pack(mask), shape, dtype)
        plain = torch.zeros(shape, device=device).masked_scatter(mask, values).double()
        assert_rounded(E, plain, plain.abs())
        assert torch.equal(kernels.compress(dE, pack(mask)), dE[mask].float())


def test_all_and_nothing_may_be_kept(device):
    for fill in (False, True):
        mask = torch.full((9, 15), fill, device=device)
        values = torch.arange(135.0, device=device)[mask.view(-1)]
        E = kernels.expand(values, pack(mask), (9, 15), torch.float32)
        assert torch.equal(E, torch.arange(135.0, device=device).view(9, 15) * mask)
        assert torch.equal(kernels.compress(E, pack(mask)), values)
        assert torch.equal(kernels.merge(E, E[:2], E[:, :2] * 0, 1.0, pack(mask)), E)


def test_views_that_are_not_contiguous_give_the_same(device):
    W, A, B, mask = case((40, 66), 3, torch.bfloat16, device)
    packed = pack(mask)
    wide = torch.cat([W, W], 1)
    for view in (wide[:, :66], W.T.contiguous().T):
        assert not view.is_contiguous()
        assert torch.equal(kernels.merge(view, A, B, 0.5, packed), kernels.merge(W, A, B, 0.5, packed))
        assert torch.equal(kernels.compress(view, packed), kernels.compress(W, packed))
        for times in (False, True):
            pair = [kernels.project(V, A, B, 0.5, packed, W=V if times else None) for V in (view, W)]
            assert all(torch.equal(one, other) for one, other in zip(*pair, strict=True))
    assert torch.equal(kernels.merge(W, A.T.contiguous().T, B, 0.5, packed), kernels.merge(W, A, B, 0.5, packed))


@pytest.mark.skipif(INTERPRETED or not COMPILER, reason="threads are of C++")
def test_the_same_inputs_give_the_same_bits(threads):
    W, A, B, mask = case((1100, 1003), 5, torch.float32, "cpu")  # enough for two threads
    packed = pack(mask)
    merged, projected, compressed, expanded = [], [], [], []
    for count in (1, 2, 2, 1):
        threads(count)
        merged.append(kernels.merge(W, A, B, 0.5, packed))
        projected.append(kernels.project(W, A, B, 0.5, packed))
        compressed.append(kernels.compress(W, packed))
        expanded.append(kernels.expand(compressed[-1], packed, W.shape, W.dtype))
    for found in (merged, compressed, expanded):
        assert all(torch.equal(found[0], other) for other in found)
    assert torch.equal(expanded[0], W * mask)
    for i in (0, 1):
        assert torch.equal(projected[0][i], projected[3][i])
        assert torch.equal(projected[1][i], projected[2][i])
        torch.testing.assert_close(projected[0][i], projected[1][i], rtol=1e-4, atol=1e-4)


def test_what_no_kernel_was_written_for_is_left_to_torch(monkeypatch):
    W, A, B, mask = case((8, 16), 2, torch.float32, "cpu")
    packed, values = pack(mask), W[mask]
    for wrong in (W.double(), W.int(), W[:, :8], W[0]):
        assert kernels.merge(wrong, A, B, 1.0, packed) is None
        assert kernels.project(wrong, A, B, 1.0, packed) is None
    for factors in ((A.double(), B), (A, B.bfloat16()), (A[:1], B), (A, B[:4])):
        assert kernels.merge(W, *factors, 1.0, packed) is None
        assert kernels.project(W, *factors, 1.0, packed) is None
    assert kernels.merge(W, A, B, 1.0, packed[1:]) is None
    assert kernels.project(W, A, B, 1.0, packed, W=W.bfloat16()) is None
    assert kernels.expand(values.double(), packed, W.shape, torch.float32) is None
    assert kernels.expand(values, packed, W.shape, torch.float64) is None
    assert kernels.compress(W.double(), packed) is None
    monkeypatch.setenv("SPARSIGHT_KERNELS", "0")
    assert kernels.merge(W, A, B, 1.0, packed) is None
    assert kernels.project(W, A, B, 1.0, packed) is None
    assert kernels.expand(values, packed, W.shape, torch.float32) is None
    assert kernels.compress(W, packed) is None
    assert kernels.pack(mask) is None
    assert kernels.unpack(packed, 128) is None


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1003])
def test_masks_are_packed_as_torch_packs_them(count, monkeypatch):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
    compiled = kernels.pack(mask)
    assert torch.equal(kernels.unpack(compiled, count), mask)
    monkeypatch.setenv("SPARSIGHT_KERNELS", "0")
    assert torch.equal(compiled, pack(mask))
    assert torch.equal(unpack(compiled, (count,)), mask)


@pytest.mark.skipif(INTERPRETED or not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("flags", [(), ("-mavx2", "-mfma", "-mf16c")], ids=["plain", "avx2"])
def test_other_processors_get_the_same(flags, monkeypatch, tmp_path):
    if flags and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("another kind of processor")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS[:-1], *flags, build.FLAGS[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.load.cache_clear()
    try:
        for dtype in DTYPES:
            test_merging_is_one_expression_rounded_once(True, False, 3, dtype, "cpu")
            test_projected_gradients_see_only_what_is_kept(True, True, 3, dtype, "cpu")
            test_values_are_expanded_and_compressed_in_order(dtype, "cpu")
    finally:
        kernels.load.cache_clear()


@pytest.mark.skipif(INTERPRETED or not find_spec("triton"), reason="no Triton")
def test_triton_gives_the_same_under_its_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
