"""Inner loops in C++ for the CPU, compiled at first use, about two seconds once per machine; without a compiler plain
torch does the same.

Every function here says no (False or None) where it cannot help: no compiler, a CUDA tensor, `SPARSIGHT_KERNELS=0`, a
shape it was not written for. The caller's torch code is then the one that runs. Masks are the same either way; swept
weights are equal up to rounding.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-march=native")
WIDTH = 128  # columns of a sweep, at most
GROUPS = (2, 4, 8)  # the m of n:m that are compiled
SIGNATURES = {  # q: 64-bit integer, i: integer, p: address
    "sparsight_sweep": "pqqqpqpqqpiii",
    "sparsight_keep_largest": "pqqqpi",
    "sparsight_keep_of_group": "pqiip",
    "sparsight_swap_rows": "pppppqqqqi",
    "sparsight_gram": "pqqqpi",
}
logger = logging.getLogger(__name__)


def sweep(
    W: torch.Tensor,
    U: torch.Tensor,
    scale: torch.Tensor,
    start: int,
    stop: int,
    keep: torch.Tensor | None,
    n: int,
    m: int,
) -> bool:
    """Prune columns `start` to `stop` of W (out, in) and update those behind them, in place; False where nothing was done.

    U (in, in) is the inverse factor, `scale` (in,) what errors are measured in: 1 / its diagonal. `keep`
    (out, stop - start) is the block's mask; without it the n of every m to keep are chosen on the way.
    """
    known = keep is not None or m in GROUPS
    if stop - start > WIDTH or not known or (library := _library(W)) is None:
        return False
    U, scale = U.contiguous(), scale.contiguous()
    mask = None if keep is None else keep.contiguous()
    address = None if mask is None else mask.data_ptr()
    rows, columns = W.shape
    library.sparsight_sweep(
        W.data_ptr(), rows, columns, W.stride(0), U.data_ptr(), U.stride(0), scale.data_ptr(), start, stop, address, n, m,
        torch.get_num_threads(),
    )  # fmt: skip
    return True


def keep_largest(score: torch.Tensor, count: int) -> torch.Tensor | None:
    """Mark exactly `count` largest entries of every row of `score` (rows, columns); 0 < count < columns."""
    if (library := _library(score)) is None:
        return None
    score = score.float().contiguous()
    keep = torch.empty(score.shape, dtype=torch.bool)
    library.sparsight_keep_largest(score.data_ptr(), *score.shape, count, keep.data_ptr(), torch.get_num_threads())
    return keep


def keep_of_group(score: torch.Tensor, n: int) -> torch.Tensor | None:
    """Mark the `n` largest of the last dimension."""
    m = score.shape[-1]
    if m not in GROUPS or (library := _library(score)) is None:
        return None
    score = score.float().contiguous()
    keep = torch.empty(score.shape, dtype=torch.bool)
    library.sparsight_keep_of_group(score.data_ptr(), score.numel() // m, n, m, keep.data_ptr())
    return keep


def swap_rows(
    W: torch.Tensor, keep: torch.Tensor, G: torch.Tensor, c: torch.Tensor, floor: torch.Tensor, m: int, cycles: int
) -> torch.Tensor | None:
    """Swap kept and pruned weights of every row of W (out, in) while that lowers the error by more than `floor` (out,).

    c (out, in) is the pruned part times the Gram matrix G (in, in); m of n:m, or 0. Returns the new mask.
    """
    if (library := _library(W)) is None:
        return None
    W, G, c, floor = (t.float().contiguous() for t in (W, G, c.clone(), floor))
    mask = keep.to(torch.uint8, copy=True, memory_format=torch.contiguous_format)
    addresses = [t.data_ptr() for t in (W, mask, G, c, floor)]
    library.sparsight_swap_rows(*addresses, *W.shape, m, cycles, torch.get_num_threads())
    return mask.bool()


def add_gram(X: torch.Tensor, upper: torch.Tensor) -> bool:
    """Add X^T X of bfloat16 inputs X (tokens, in) to the upper triangle of `upper` (in, in) float32, in place.

    False where nothing was done: other dtypes, CPUs without bfloat16 products. The lower triangle is left undefined.
    """
    if X.dtype != torch.bfloat16 or X.stride(1) != 1 or (library := _library(X)) is None:
        return False
    done = library.sparsight_gram(X.data_ptr(), *X.shape, X.stride(0), upper.data_ptr(), torch.get_num_threads())
    return bool(done)


def _library(tensor: torch.Tensor) -> ctypes.CDLL | None:
    fits = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return load() if fits and os.environ.get("SPARSIGHT_KERNELS") != "0" else None


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the compiled kernels; None, and one line in the log, where they cannot be had."""
    try:
        library = _open()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info("no compiled kernels, plain torch runs instead: %s", error)
        return None
    kinds = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int}
    for name, letters in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [kinds[letter] for letter in letters], ctypes.c_int
    return library


def _open() -> ctypes.CDLL:
    """Load the kernels from the user's cache, and put them there first if need be.

    The name says which source, compiler and CPU they are of. They are built beside their place and moved into it whole,
    so that no other process ever sees half of them; without a cache to write to they are built for this process alone.
    """
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++, c++ or $CXX)")
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    recipe = [version, _cpu().encode(), " ".join(FLAGS).encode(), *(source.read_bytes() for source in sources)]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sparsight" / "kernels"
    place = folder / f"{hashlib.sha256(b'|'.join(recipe)).hexdigest()[:24]}.so"
    if place.exists():
        return ctypes.CDLL(str(place))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError:
        scratch = tempfile.TemporaryDirectory()
    with scratch:
        built = Path(scratch.name) / place.name
        _compile(compiler, sources, built)
        library = ctypes.CDLL(str(built))  # stays when the file is gone
        with contextlib.suppress(OSError):
            built.replace(place)
    return library


def _compile(compiler: str, sources: list[Path], built: Path) -> None:
    for flags in (FLAGS, FLAGS[:-1]):  # some compilers know no -march=native
        command = [compiler, *flags, "-o", str(built), *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            return
    raise RuntimeError(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def _cpu() -> str:
    """Say what the machine can run: code for one CPU may not run on another that shares the folder."""
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
