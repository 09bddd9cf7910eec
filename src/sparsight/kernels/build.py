"""How the kernels in C++ are compiled at first use, kept, and found again."""

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
}
logger = logging.getLogger(__name__)


def library_for(tensor: torch.Tensor, *dtypes: torch.dtype) -> ctypes.CDLL | None:
    """Return the kernels if they may run on `tensor`, of one of `dtypes` (float32, bfloat16 or float16)."""
    fits = tensor.device.type == "cpu" and tensor.dtype in (dtypes or DTYPES)
    return load() if fits and os.environ.get("SPARSIGHT_KERNELS") != "0" else None


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the compiled kernels; None, and one line in the log, where they cannot be had."""
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
