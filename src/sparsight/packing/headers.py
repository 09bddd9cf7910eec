"""The header of a safetensors file: what it holds and where; read without the data, written as safetensors writes it."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sparsight.errors import SparsightError

KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
# the order in which safetensors writes dtypes
DTYPES = {text: dtype for dtype, text in KINDS.items()}
ORDER = [
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
]  # fmt: skip


@dataclass(frozen=True)
class Header:
    """Dtype, shape and offsets of every tensor by name, and where the data begins in the file."""

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of one tensor."""
        entry = self.entries[name]
        return DTYPES[entry["dtype"]], tuple(entry["shape"])


def read_header(path: Path) -> Header:
    """The header of a safetensors file; one that was read before is not read again while the file is the same.

    **Raises** `SparsightError` for a file that is cut short or damaged, `OSError` for one that cannot be read.
    """
    facts = path.stat()
    return _read_header(path, facts.st_size, (facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns))


@lru_cache(maxsize=8)
def _read_header(path: Path, whole: int, version: tuple[int, ...]) -> Header:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if 8 + size <= whole else None
        metadata = (header or {}).pop("__metadata__", None) or {}
        ends = [entry["data_offsets"][1] for entry in (header or {}).values() if entry["dtype"] and len(entry["shape"]) >= 0]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        header, ends = None, []
    if header is None or 8 + size + max(ends, default=0) != whole:
        raise SparsightError(f"{path}: is cut short or damaged; copy it again from where it came from")
    return Header(header, metadata, 8 + size)


def map_tensors(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, each a mapping of its own bytes, which a change does not write back.

    A mapping of the whole file, as `safe_open` gives, would count against the address space, and keep every changed page
    until the last tensor of the file is gone. **Raises** `SparsightError` for a damaged file.
    """
    header = read_header(path)
    tensors = {}
    with path.open("rb") as file:
        for name in names:
            dtype, shape = header.form(name)
            begin, end = (header.start + offset for offset in header.entries[name]["data_offsets"])
            base = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            if begin == end:
                tensors[name] = torch.empty(shape, dtype=dtype)
                continue
            area = mmap.mmap(file.fileno(), end - base, access=mmap.ACCESS_COPY, offset=base)
            data = torch.frombuffer(area, dtype=torch.uint8, count=end - begin, offset=begin - base)
            aligned = data if (begin - base) % dtype.itemsize == 0 else data.clone()
            tensors[name] = aligned.view(dtype).reshape(shape)
    return tensors


def header_entry(dtype: torch.dtype, shape: Any, start: int) -> dict[str, Any]:
    """What a header says of one tensor that begins at byte `start`."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [start, start + size]}


def header_text(header: Mapping[str, Any]) -> bytes:
    """A header as safetensors writes it."""
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def in_order(forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """Names, of these dtypes and shapes, in the order in which safetensors writes them: the widest dtypes first."""
    return sorted(forms, key=lambda name: (ORDER.index(KINDS[forms[name][0]]), name))
