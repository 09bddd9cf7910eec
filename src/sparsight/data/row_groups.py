"""Some rows of parquet files, here or on the Hub, of which only the groups of rows that hold them are read."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any


class RowGroups(Sequence[Mapping[str, Any]]):
    """The rows of parquet files as dicts, images as `{"bytes", "path"}`; the group that was read last stays in memory.

    Of a file the footer is read first, and then groups as rows are asked for. Paths may be addresses that `fsspec` opens,
    such as `hf://`. **Raises** what `pyarrow` and the file system raise.
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
        self._last: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self._ends, index)
        if self._last[0] != place:
            number, group = self._groups[place]
            self._last = (place, self._files[number].read_row_group(group))
        start = self._ends[place - 1] if place else 0
        return self._last[1].slice(index - start, 1).to_pylist()[0]

    def column(self, name: str) -> list[Any]:
        """The values of a column, in order, of which nothing else is read; empty where there is none of this name."""
        values: list[Any] = []
        for file in self._files:
            if name in file.schema_arrow.names:
                values += file.read(columns=[name]).column(0).to_pylist()
        return values
