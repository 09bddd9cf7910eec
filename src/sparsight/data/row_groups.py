"""Some rows of parquet files, here or on the Hub, of which only the groups of rows that hold them are read."""

from __future__ import annotations

import bisect
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PART = 16 * 2**20  # bytes of a group that are held at once


class RowGroups(Sequence[Mapping[str, Any]]):
    """The rows of parquet files as dicts, images as `{"bytes", "path"}`; the part that was read last stays in memory.

    Of a file the footer is read first, and then groups as rows are asked for, each from its start in parts of `PART` bytes.
    A row before the last part is read from the start of its group again. Paths may be addresses that `fsspec` opens, such
    as `hf://`. **Raises** what `pyarrow` and the file system raise.
    """

    def __init__(self, files: Sequence[str]) -> None:
        import fsspec
        from pyarrow import parquet

        self._files = [parquet.ParquetFile(fsspec.open(str(file), "rb").open()) for file in files]
        sizes = [
            (number, group, file.metadata.row_group(group).num_rows)
            for number, file in enumerate(self._files)
            for group in range(file.metadata.num_row_groups)
        ]
        self._groups = [(number, group) for number, group, _ in sizes]
        self._ends = list(itertools.accumulate(size for *_, size in sizes))
        self._place, self._start, self._part = -1, 0, None  # the group, and its part with its first row
        self._parts: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self._ends, index)
        if place != self._place or index < self._start:
            self._open(place)
        while self._part is None or index >= self._start + len(self._part):
            self._start += len(self._part or ())
            try:
                self._part = next(self._parts)
            except BaseException:
                self._place = -1  # the next row begins anew
                raise
        return self._part.slice(index - self._start, 1).to_pylist()[0]

    def _open(self, place: int) -> None:
        """Begin with a group; what was read before is let go."""
        number, group = self._groups[place]
        facts = self._files[number].metadata.row_group(group)
        rows = max(1, facts.num_rows * PART // max(facts.total_byte_size, PART))
        self._place, self._start, self._part = place, self._ends[place - 1] if place else 0, None
        self._parts = self._files[number].iter_batches(batch_size=rows, row_groups=[group])

    def column(self, name: str) -> list[Any]:
        """The values of a column, in order, of which nothing else is read; empty where there is none of this name."""
        values: list[Any] = []
        for file in self._files:
            if name in file.schema_arrow.names:
                values += file.read(columns=[name]).column(0).to_pylist()
        return values


def release() -> None:
    """Give the memory that Arrow keeps for later back to the system."""
    if "pyarrow" in sys.modules:
        import pyarrow

        pyarrow.default_memory_pool().release_unused()
