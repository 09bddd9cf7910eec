"""Compile the kernels in C++ at first use, and keep the library in the user's cache."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-march=native")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in adapt.cpp
SIGNATURES = {  # q: 64-bit integer, i: integer, p: address, d: double
    "sparsight_sweep": "pqqqpqpqqpiii",
    "sparsight_keep_largest": "pqqqpi",
    "sparsight_keep_of_group": "pqiip",
    "sparsight_swap_rows": "pppppqqqqi",
    "sparsight_gram": "pqqqpi",
    "sparsight_merge": "piqqqppqdpqipi",
    "sparsight_project": "piqqqpqppqdpqppi",
    "sparsight_expand": "pqpqqipi",
    "sparsight_compress": "pipqqpi",
    "sparsight_count": "pqp",
    "sparsight_pack": "pqp",
    "sparsight_unpack": "pqp",
    "sparsight_offsets": "pqqp",
    "sparsight_product": "pippqqpqppi",
    "sparsight_product_int8": "ppippqqpqppi",
    "sparsight_product_tiles": "ppppqqpqppi",
    "sparsight_has_tiles": "",
    "sparsight_expand_rows": "pippqqqqpi",
    "sparsight_pack_rows": "piqqppp",
    "sparsight_read": "pqpi",
}
logger = logging.getLogger(__name__)


def library_for(tensor: torch.Tensor, *dtypes: torch.dtype) -> ctypes.CDLL | None:
    """Return the kernels if `tensor` is on the CPU and of one of `dtypes` (by default those of `DTYPES`), else None."""
    fits = tensor.device.type == "cpu" and tensor.dtype in (dtypes or DTYPES)
    return load() if fits and os.environ.get("SPARSIGHT_KERNELS") != "0" else None


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None with one line in the log; compiles them at most once per machine."""
    try:
        library = _open()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info("no compiled kernels, plain torch runs instead: %s", error)
        return None
    kinds = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int, "d": ctypes.c_double}
    for name, letters in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [kinds[letter] for letter in letters], ctypes.c_int
    return library


def _open() -> ctypes.CDLL:
    """Load the kernels from the user's cache, and put them there first if need be.

    The file name is a hash of sources, compiler and CPU. The library is built beside its place and then moved, so that no
    other process reads half of it; if the cache cannot be written to, it is built for this process alone.
    """
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++, c++ or $CXX)")
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    headers = sorted(Path(__file__).parent.glob("*.h"))
    recipe = [version, _cpu().encode(), " ".join(FLAGS).encode(), *(path.read_bytes() for path in (*sources, *headers))]
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
    """Compile the sources side by side, and link them."""

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run([compiler, *command], capture_output=True, text=True, timeout=300)

    for flags in (FLAGS, FLAGS[:-1]):  # some compilers know no -march=native
        parts = [str(built.parent / f"{source.stem}.o") for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [(*flags, "-c", "-o", part, str(source)) for part, source in zip(parts, sources, strict=True)]
            done = list(pool.map(lambda command: run(*command), commands))
        if not any(process.returncode for process in done):
            done.append(run(*flags, "-o", str(built), *parts))
        failed = [process for process in done if process.returncode]
        if not failed:
            return
    raise RuntimeError(f"{compiler} failed: {(failed[0].stderr.strip().splitlines() or ['no message'])[-1]}")


def _cpu() -> str:
    """Return the CPU's features: code for one CPU may not run on another that shares the folder."""
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
