"""Compiled selection equals plain torch; how the kernels are built, kept, and done without."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sparsight import kernels
from sparsight.masks.pattern import keep_largest, keep_of_group

COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")


@COMPILER
@pytest.mark.parametrize("shape", [(1, 5), (7, 64), (3, 1000), (2, 70_000)])
def test_compiled_selection_equals_plain_torch(shape, monkeypatch):
    g = torch.Generator().manual_seed(0)
    smooth, tied = torch.randn(shape, generator=g), torch.randint(-2, 3, shape, generator=g).float()
    tied[0, ::2] *= -1  # zeros of both signs are equal
    cases = [smooth, tied, torch.full(shape, -1.5), smooth.bfloat16(), (tied / 0).nan_to_num(nan=0.0, posinf=float("inf"))]
    counts = sorted({1, shape[1] // 3, shape[1] // 2, shape[1] - 1} - {0})
    for score in cases:
        for count in counts:
            compiled = kernels.keep_largest(score, count)
            with monkeypatch.context() as patch:
                patch.setenv("SPARSIGHT_KERNELS", "0")
                assert torch.equal(compiled, keep_largest(score, count))
            assert compiled.sum(1).unique().tolist() == [count]


@COMPILER
@pytest.mark.parametrize("m", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 5, 300, 1027])
def test_compiled_choice_of_a_group_equals_plain_torch(m, groups, monkeypatch):
    g = torch.Generator().manual_seed(0)
    for score in (torch.randn(groups, m, generator=g), torch.randint(-1, 2, (3, groups, m), generator=g).float()):
        for n in range(1, m):
            compiled = kernels.keep_of_group(score, n)
            with monkeypatch.context() as patch:
                patch.setenv("SPARSIGHT_KERNELS", "0")
                assert torch.equal(compiled, keep_of_group(score, n))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Load the kernels anew, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernels.load.cache_clear()
    yield tmp_path / "cache" / "sparsight" / "kernels"
    kernels.load.cache_clear()


def test_a_compiler_that_fails_is_no_compiler(fresh, monkeypatch, tmp_path, caplog):
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "internal error" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with caplog.at_level(logging.INFO, logger="sparsight"):
        assert kernels.load() is None
    assert "broken failed: internal error" in caplog.text
    assert list(fresh.iterdir()) == []


@COMPILER
def test_kernels_are_kept_and_found_again(fresh):
    assert kernels.load() is not None
    (kept,) = fresh.iterdir()
    born = kept.stat().st_mtime_ns
    kernels.load.cache_clear()
    assert kernels.load() is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [born]


@COMPILER
def test_without_a_place_to_keep_them_kernels_are_built_for_one_process(fresh):
    fresh.parent.parent.mkdir(parents=True)
    fresh.parent.write_text("a file where the folder should be")
    assert kernels.load() is not None
    assert fresh.parent.is_file()


@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (7, 33), (64, 100), (1500, 48), (300, 129)])
def test_the_gram_matrix_of_bfloat16_inputs_is_summed_in_float32(tokens, columns):
    if kernels.load() is None:
        pytest.skip("no compiler here")
    X = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).bfloat16() + 0.5
    G = torch.ones(columns, columns)
    if not kernels.add_gram(X, G):
        pytest.skip("no bfloat16 products on this CPU")
    expected = (1 + X.double().T @ X.double()).triu()
    assert float((G.triu() - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.skipif(
    not (shutil.which("g++") and kernels.has_tiles(torch.zeros(1, dtype=torch.bfloat16))),
    reason="needs g++ and a CPU with matrix tiles",
)
def test_the_gram_matrix_without_matrix_tiles(tmp_path):
    library = tmp_path / "gram.so"
    sources = [Path(kernels.__file__).parent / name for name in ("gram.cpp", "threads.cpp")]
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-pthread", "-march=native", "-mno-amx-tile", "-mno-amx-bf16"]
    subprocess.run(["g++", *flags, "-mno-amx-int8", "-o", library, *sources], check=True)
    gram = ctypes.CDLL(str(library)).sparsight_gram
    gram.argtypes = [{"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int}[letter] for letter in "pqqqpi"]
    X = torch.randn(1100, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, plain = torch.zeros(130, 130), torch.zeros(130, 130)
    assert kernels.add_gram(X, ours)
    assert gram(X.data_ptr(), *X.shape, X.stride(0), plain.data_ptr(), 2) == 1
    torch.testing.assert_close(ours.triu(), plain.triu(), rtol=1e-4, atol=1e-2)


def test_moments_of_bfloat16_inputs_are_the_same_with_and_without_kernels(monkeypatch):
    from sparsight.calibration.moments import Moments

    X = torch.randn(300, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    grams = []
    for switch in ("1", "0"):
        monkeypatch.setenv("SPARSIGHT_KERNELS", switch)
        moments = Moments(80, X.device, with_gram=True)
        moments.add(X[:, :])
        moments.add(X[::3], image=torch.arange(100) % 2 == 0)
        grams.append(moments.gram)
    torch.testing.assert_close(*grams, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(grams[0].diagonal(), moments.squares, rtol=1e-5, atol=1e-3)
