"""The masked low-rank products of SparseLoRA as Triton kernels: one program per tile, the mask read in bits.

All sums are exact float32: "ieee" turns the tensor cores' tf32 off. Ranks are read `RANK` at a time, padded with zeros.
A program of `project` writes the parts of dA and dB from its tile, and torch adds the parts: no atomics, so the same
inputs give the same bits. `TRITON_INTERPRET=1`, set before the import, runs all of it on the CPU.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

HIGH, WIDE, RANK = 64, 64, 16  # a tile's rows and columns; ranks of one product
FLAT = 1024  # flat entries of one program, whole bytes of the mask


@triton.jit
def _kept(bits, place, inside):
    """The mask at flat places, true where it is 1."""
    byte = tl.load(bits + place // 8, mask=inside, other=0).to(tl.int32)
    return ((byte >> (place % 8).to(tl.int32)) & 1) != 0


@triton.jit
def _merge(
    W, A, B, bits, E, rows, columns, rank, scaling, ld,
    MASKED: tl.constexpr, TIMES: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * HIGH + tl.arange(0, HIGH)[:, None]
    i = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)[None, :]
    inside = (o < rows) & (i < columns)
    change = tl.zeros((HIGH, WIDE), tl.float32)
    for first in range(0, rank, RANK):
        down, along = first + tl.arange(0, RANK)[:, None], first + tl.arange(0, RANK)[None, :]
        a = tl.load(A + down * columns + i, mask=(down < rank) & (i < columns), other=0.0)
        b = tl.load(B + o * rank + along, mask=(o < rows) & (along < rank), other=0.0)
        change += tl.dot(b, a, input_precision="ieee")
    w = tl.load(W + o * ld + i, mask=inside, other=0.0).to(tl.float32)
    e = w * (1.0 + scaling * change) if TIMES else w + scaling * change
    place = o * columns + i
    if MASKED:
        e = tl.where(_kept(bits, place, inside), e, 0.0)
    tl.store(E + place, e.to(E.dtype.element_ty), mask=inside)


@triton.jit
def _project(
    dE, W, A, B, bits, dA, dB, rows, columns, rank, ld, ldw,
    MASKED: tl.constexpr, TIMES: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    high, wide = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o = high * HIGH + tl.arange(0, HIGH)[:, None]
    i = wide * WIDE + tl.arange(0, WIDE)[None, :]
    inside = (o < rows) & (i < columns)
    d = tl.load(dE + o * ld + i, mask=inside, other=0.0).to(tl.float32)
    if TIMES:
        d *= tl.load(W + o * ldw + i, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        d = tl.where(_kept(bits, o * columns + i, inside), d, 0.0)
    for first in range(0, rank, RANK):
        down, along = first + tl.arange(0, RANK)[:, None], first + tl.arange(0, RANK)[None, :]
        a = tl.load(A + down * columns + i, mask=(down < rank) & (i < columns), other=0.0)
        b = tl.load(B + o * rank + along, mask=(o < rows) & (along < rank), other=0.0)
        da = tl.dot(tl.trans(b), d, input_precision="ieee")  # (RANK, WIDE)
        db = tl.dot(d, tl.trans(a), input_precision="ieee")  # (HIGH, RANK)
        tl.store(dA + (high * rank + down) * columns + i, da, mask=(down < rank) & (i < columns))
        tl.store(dB + (wide * rows + o) * rank + along, db, mask=(o < rows) & (along < rank))


@triton.jit
def _count(bits, counts, size, FLAT: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    place = program * FLAT + tl.arange(0, FLAT)
    tl.store(counts + program, tl.sum(_kept(bits, place, place < size).to(tl.int32)))


@triton.jit
def _expand(values, bits, starts, out, size, FLAT: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    place = program * FLAT + tl.arange(0, FLAT)
    kept = _kept(bits, place, place < size)
    behind = tl.cumsum(kept.to(tl.int32), 0) - 1
    v = tl.load(values + tl.load(starts + program) + behind, mask=kept, other=0.0)
    tl.store(out + place, v.to(out.dtype.element_ty), mask=place < size)


@triton.jit
def _compress(dE, bits, starts, out, size, FLAT: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    place = program * FLAT + tl.arange(0, FLAT)
    kept = _kept(bits, place, place < size)
    behind = tl.cumsum(kept.to(tl.int32), 0) - 1
    v = tl.load(dE + place, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + tl.load(starts + program) + behind, v, mask=kept)


def merge(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, packed: torch.Tensor | None, times: bool
) -> torch.Tensor:
    """Compute `adapt.merge` on a GPU; the rows of W must be contiguous."""
    E = torch.empty(W.shape, dtype=W.dtype, device=W.device)
    with _on(W):
        _merge[_tiles(W)](
            W, A, B, W if packed is None else packed, E, *W.shape, len(A), scaling, W.stride(0),
            MASKED=packed is not None, TIMES=times, HIGH=HIGH, WIDE=WIDE, RANK=RANK,
        )  # fmt: skip
    return E


def project(
    dE: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    packed: torch.Tensor | None,
    W: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `adapt.project` on a GPU. Memory: a part of dA per `HIGH` rows and of dB per `WIDE` columns."""
    high, wide = _tiles(dE)
    dA, dB = A.new_empty(high, *A.shape), B.new_empty(wide, *B.shape)
    with _on(dE):
        _project[high, wide](
            dE, dE if W is None else W, A, B, dE if packed is None else packed, dA, dB, *dE.shape, len(A), dE.stride(0),
            0 if W is None else W.stride(0),
            MASKED=packed is not None, TIMES=W is not None, HIGH=HIGH, WIDE=WIDE, RANK=RANK,
        )  # fmt: skip
    return dA.sum(0).mul_(scaling), dB.sum(0).mul_(scaling)


def expand(values: torch.Tensor, packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Compute `adapt.expand` on a GPU, into `out`."""
    starts = _ends(packed, out.numel())[:-1]
    with _on(out):
        _expand[(len(starts),)](values, packed, starts, out, out.numel(), FLAT=FLAT)
    return out


def compress(dE: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Compute `adapt.compress` on a GPU; waits for the GPU to count the mask."""
    ends = _ends(packed, dE.numel())
    values = torch.empty(int(ends[-1]), device=dE.device)
    with _on(dE):
        _compress[(len(ends) - 1,)](dE, packed, ends, values, dE.numel(), FLAT=FLAT)
    return values


def _ends(packed: torch.Tensor, size: int) -> torch.Tensor:
    """Count the bits that are set before each program's part, and before the end."""
    programs = triton.cdiv(size, FLAT)
    counts = torch.zeros(programs + 1, dtype=torch.int64, device=packed.device)
    with _on(packed):
        _count[(programs,)](packed, counts[1:], size, FLAT=FLAT)
    return counts.cumsum(0)


def _tiles(W: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(W.shape[0], HIGH), triton.cdiv(W.shape[1], WIDE)


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
