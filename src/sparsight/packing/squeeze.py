"""bfloat16 values in fewer bytes, without loss: exponents Huffman-coded by zlib, signs and fractions as they are.

Trained weights use few of the 256 exponents, those that are kept by magnitude fewer still; signs and fractions are as good
as random. A squeezed tensor is one row of bytes that says its own shape:

    uint32 dimensions, size of each, blocks, bytes of each block · the blocks, a zlib stream each · a byte of sign and
    fraction per value

For disks and networks: nothing computes with it.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from sparsight.errors import SparsightError

BLOCK = 1 << 20  # values per zlib stream
LEAST = 4096  # values that are worth it


def squeeze(values: torch.Tensor) -> torch.Tensor | None:
    """Squeeze bfloat16 `values` of any shape into uint8 (bytes,); None for other dtypes, few values, and no gain."""
    if values.dtype != torch.bfloat16 or not LEAST <= values.numel() < 1 << 32:
        return None
    words = values.detach().cpu().contiguous().view(torch.int16).reshape(-1).numpy().view(np.uint16)
    exponents = ((words >> 7) & 255).astype(np.uint8)
    rest = ((words >> 8) & 128 | words & 127).astype(np.uint8)
    blocks = _in_threads(_code, [exponents[i : i + BLOCK] for i in range(0, len(exponents), BLOCK)])
    head = np.array([values.ndim, *values.shape, len(blocks), *map(len, blocks)], dtype="<u4")
    if head.nbytes + sum(map(len, blocks)) >= exponents.nbytes:
        return None
    return torch.from_numpy(np.frombuffer(b"".join([head.tobytes(), *blocks, rest.tobytes()]), dtype=np.uint8).copy())


def unsqueeze(squeezed: torch.Tensor) -> torch.Tensor:
    """The bfloat16 values that `squeeze` was given, on the device of `squeezed`.

    **Raises** `SparsightError` for bytes that it did not write.
    """
    if squeezed.dtype != torch.uint8 or squeezed.ndim != 1:
        raise _damaged()
    data = squeezed.detach().cpu().contiguous().numpy()
    shape, sizes, at = _head(data)
    count = math.prod(shape)
    blocks = [data[start : start + size] for start, size in zip(np.cumsum([at, *sizes[:-1]]), sizes, strict=True)]
    rest = data[at + sum(sizes) :]
    if len(rest) != count or len(sizes) != -(-count // BLOCK):
        raise _damaged()
    words = np.empty(count, dtype=np.uint16)

    def decode(i: int) -> None:
        try:
            exponents = np.frombuffer(zlib.decompress(blocks[i].tobytes(), bufsize=BLOCK), dtype=np.uint8)
        except zlib.error as error:
            raise _damaged() from error
        place = slice(i * BLOCK, min(count, (i + 1) * BLOCK))
        if len(exponents) != place.stop - place.start:
            raise _damaged()
        low = rest[place].astype(np.uint16)
        words[place] = (low & 128) << 8 | exponents.astype(np.uint16) << 7 | low & 127

    _in_threads(decode, range(len(blocks)))
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).view(shape).to(squeezed.device)


def _code(exponents: np.ndarray) -> bytes:
    coder = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(exponents.tobytes()) + coder.flush()


def _head(data: np.ndarray) -> tuple[tuple[int, ...], list[int], int]:
    """Shape, sizes of the blocks, and where the blocks begin."""
    try:
        words = data[: len(data) // 4 * 4].view("<u4")
        dimensions = int(words[0])
        shape = tuple(int(size) for size in words[1 : 1 + dimensions])
        count = int(words[1 + dimensions])
        sizes = [int(size) for size in words[2 + dimensions : 2 + dimensions + count]]
    except (IndexError, ValueError) as error:
        raise _damaged() from error
    at = 4 * (2 + dimensions + count)
    if len(shape) != dimensions or len(sizes) != count or not count or at + sum(sizes) > len(data):
        raise _damaged()
    return shape, sizes, at


def _damaged() -> SparsightError:
    return SparsightError(
        "squeezed values are damaged; copy the file again from where it came from, or pack the model again"
    )


def _in_threads(run: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Run on every item, in threads where there is more than one; zlib works without Python's lock."""
    workers = min(len(items), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers < 2:
        return [run(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, items))
