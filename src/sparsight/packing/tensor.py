"""A tensor as a bitmask and the values that it keeps: lossless in its own dtype, or rounded to int8.

The values lie in order; the bits have one row per row of the tensor, lowest bit first, and each row starts on a byte.
Kept is every value but +0, by its bytes, so that a kept -0.0 comes back, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sparsight import kernels
from sparsight.errors import SparsightError

BITS, SCALE = "_bits", "_scale"  # what is added to the name of the values
LEVELS = 127  # an int8 value lies between -LEVELS and LEVELS
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BYTE = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


@dataclass(frozen=True)
class Packed:
    """A packed tensor of `shape` (..., columns).

    `values` are (..., k) where every row keeps k, else (kept,); `bits` uint8 (..., ceil(columns / 8)); `scale` float32
    (...,), a scale per row, for int8 values only.
    """

    values: torch.Tensor
    bits: torch.Tensor
    shape: tuple[int, ...]
    scale: torch.Tensor | None = None

    @classmethod
    def of(cls, W: torch.Tensor) -> Packed:
        """Pack W (..., columns), of two dimensions at least, without loss."""
        rows = W.detach().reshape(-1, W.shape[-1])
        values, bits = kernels.pack_rows(rows) or _pack_rows(rows)
        return cls(values, bits.view(*W.shape[:-1], -1), tuple(W.shape)).by_row()

    @classmethod
    def int8(cls, W: torch.Tensor) -> Packed:
        """Pack W (..., columns) with its kept values rounded to int8, with a scale per row.

        **Raises** `SparsightError` for values that are not finite.
        """
        rows = W.detach().reshape(-1, W.shape[-1]).float()
        rows = torch.where(rows == 0, 0.0, rows)  # a -0.0 is not kept
        most = rows.abs().amax(1)
        if not most.isfinite().all():
            raise SparsightError("holds a NaN or an infinite weight, which int8 has no code for")
        scale = most / LEVELS
        codes = (rows / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round_()
        bits = (kernels.pack_rows(rows) or _pack_rows(rows))[1]
        values = codes[rows != 0].to(torch.int8)
        shape = tuple(W.shape)
        return cls(values, bits.view(*shape[:-1], -1), shape, scale.view(shape[:-1])).by_row()

    def by_row(self) -> Packed:
        """The same with values (..., k) where every row keeps k, else (kept,)."""
        counts = row_offsets(self.bits.reshape(-1, self.bits.shape[-1])).diff()
        uniform = len(counts) > 0 and bool((counts == counts[0]).all())
        shape = (*self.shape[:-1], int(counts[0])) if uniform else (-1,)
        return replace(self, values=self.values.reshape(shape))

    @property
    def nbytes(self) -> int:
        """Bytes of values, bits and scales."""
        return sum(tensor.nbytes for tensor in (self.values, self.bits, self.scale) if tensor is not None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by what is added to the tensor's name."""
        scale = {} if self.scale is None else {SCALE: self.scale}
        return {**scale, "": self.values, BITS: self.bits}

    def expand(self, dtype: torch.dtype | None = None, offset: torch.Tensor | None = None) -> torch.Tensor:
        """The dense tensor, in `dtype`, by default that of the values (of int8 values: float32); `offset` if it is known.

        **Raises** `SparsightError` where the bits do not belong to the values.
        """
        offset = self.offset() if offset is None else offset
        values, columns = self.values.reshape(-1), self.shape[-1]
        bits = self.bits.reshape(-1, self.bits.shape[-1])
        out = torch.empty(len(bits), columns, dtype=values.dtype, device=values.device)
        if not kernels.expand_rows(values, bits, offset, columns, out):
            out.zero_()[unpack_rows(bits, columns)] = values
        if self.scale is not None:
            out = out.float().mul_(self.scale.reshape(-1, 1))
        return out.view(self.shape).to(dtype or out.dtype)

    def offset(self) -> torch.Tensor:
        """Where the values of each row begin, as `row_offsets` says.

        **Raises** `SparsightError` where bits or scales are not those of a tensor of this shape and with these values.
        """
        *rows, columns = self.shape
        parts = [(self.bits, [*rows, (columns + 7) // 8], torch.uint8), (self.scale, rows, torch.float32)]
        fits = all(part is None or (list(part.shape) == shape and part.dtype == dtype) for part, shape, dtype in parts)
        if fits:
            bits = self.bits.reshape(-1, self.bits.shape[-1])
            offset = row_offsets(bits)
            beyond = columns % 8 and bool((bits[:, -1] >> columns % 8).any())
            if not beyond and int(offset[-1]) == self.values.numel():
                return offset
        raise SparsightError(
            f"the bits {list(self.bits.shape)} do not belong to {self.values.numel()} values of {list(self.shape)}; "
            "the file is damaged: copy it again from where it came from, or pack the model again"
        )


def row_offsets(bits: torch.Tensor) -> torch.Tensor:
    """Where the values of each row of bits (rows, bytes) begin: int64 (rows + 1,), the last entry their number."""
    if (offset := kernels.row_offsets(bits)) is not None:
        return offset
    counts = unpack_rows(bits, 8 * bits.shape[1]).sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def unpack_rows(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """The boolean mask (rows, columns) of rows of bits."""
    mask = (bits.unsqueeze(-1) & _BYTE.to(bits.device)) != 0
    return mask.view(len(bits), 8 * bits.shape[1])[:, :columns]


def _pack_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept = rows.contiguous().view(_WORDS[rows.element_size()]) != 0
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.shape[1] % 8))
    bits = (padded.view(len(rows), -1, 8) * _BYTE.to(rows.device)).sum(-1, dtype=torch.uint8)
    return rows[kept], bits
