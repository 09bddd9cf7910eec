"""Rows of `datasets`: names on the Hub, saved datasets, parquet files, and which of their splits is read.

Images stay as they are stored, encoded and on disk, until they are used.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sparsight.data.images import BadRecord, StoredImage
from sparsight.data.row_groups import RowGroups
from sparsight.errors import SparsightError, first_line, quote

HELD_OUT = ("test", "validation", "val", "valid", "dev", "eval")  # splits to score on, the best first

Rows = Sequence[tuple[int, Callable[[], Any]]]  # a line, or a row of a table, and the function that reads its record


class Table(Sequence[Mapping[str, Any]]):
    """A dataset whose rows are dicts, with images as `StoredImage`, which are read when they are used."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._plain = dataset.with_format("arrow") if hasattr(dataset, "with_format") else dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        row = self._row(index)
        return {key: self._stored(value, index, (key,)) for key, value in row.items()}

    def content(self, index: int, place: Sequence[Any]) -> bytes:
        """The encoded image at a place of a row. **Raises** `OSError` for a file that is not there."""
        value: Any = self._row(index)
        for key in place:
            value = value[key]
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    def column(self, name: str) -> list[Any]:
        """The values of a column, in order; empty where there is none of this name."""
        return list(self.dataset[name]) if name in self.dataset.column_names else []

    def _row(self, index: int) -> dict[str, Any]:
        return self._plain[index].to_pylist()[0]

    def _stored(self, value: Any, index: int, place: tuple[Any, ...]) -> Any:
        if isinstance(value, list) and place[-1] in self._images:
            return [self._stored(item, index, (*place, i)) for i, item in enumerate(value)]
        if place[0] not in self._images or not isinstance(value, dict) or set(value) != {"bytes", "path"}:
            return value
        if value["bytes"] is not None or Path(value["path"] or "").is_file():
            return StoredImage(partial(self.content, index, place))
        return value

    @cached_property
    def _images(self) -> set[str]:
        """The columns of images, or of lists of them; a file that was not written by `datasets` may not say so."""
        import datasets

        kinds = {name: getattr(kind, "feature", kind) for name, kind in self.dataset.features.items()}
        stored = {"bytes", "path"}
        return {
            name
            for name, kind in kinds.items()
            if isinstance(kind, datasets.Image) or (isinstance(kind, Mapping) and set(kind) == stored)
        }


def parquet_table(source: str, files: Sequence[str], few: bool = False) -> Table | RowGroups:
    """The rows of parquet files, one after another; with `few` only the groups with rows that are asked for are read.

    **Raises** `SparsightError` for what `datasets` cannot read.
    """
    datasets = _datasets(source)
    with _loading(datasets, source):
        if few:
            return RowGroups(files)
        return Table(datasets.load_dataset("parquet", data_files=list(files), split="train"))


def hub_table(
    name: str, configuration: str, pick: Callable[[Sequence[str]], str], few: bool = False
) -> tuple[Table | RowGroups, str]:
    """A dataset on the Hub, and its split, which `pick` chooses by name; `few` as in `parquet_table`.

    **Raises** `SparsightError` for what `datasets` cannot load.
    """
    datasets = _datasets(name)
    with _loading(datasets, name):
        builder = datasets.load_dataset_builder(name, configuration or None)
        split = pick([str(each) for each in builder.info.splits or builder.config.data_files or ("train",)])
        if few and (files := _parquet_files(builder, split)):
            return RowGroups(files), split
        return Table(datasets.load_dataset(name, configuration or None, split=split)), split


def _parquet_files(builder: Any, split: str) -> list[str]:
    """The parquet files of a split, with which a dataset is read without `datasets`; empty where it has other files."""
    files = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
    return files if files and all(file.endswith(".parquet") for file in files) else []


def choose_split(source: Any, names: Sequence[str], split: str | None, held_out: bool) -> str:
    """The split to read: the one that is asked for, else `train`, or for held-out samples `test` or `validation`.

    **Raises** `SparsightError` where it is not there, with the line that asks for another.
    """
    have = ", ".join(map(repr, names))
    if split is not None:
        if re.split(r"[\[+]", split)[0] not in names:
            raise SparsightError(f"{source}: no split {quote(split)}; it has {have}")
        return split
    if not held_out:
        if "train" not in names:
            raise SparsightError(f"{source}: no split 'train'; it has {have}; name one with `split`")
        return "train"
    for name in HELD_OUT:
        if name in names:
            return name
    raise SparsightError(
        f"{source}: has no split to score on, only {have}; give other data, or say `split={names[0]}` to score on that"
    )


def dataset_rows(
    source: str, split: str | None, held_out: bool, *, saved: bool = False, configuration: str = "", few: bool = False
) -> tuple[Rows, str]:
    """The rows of a dataset and the name of the split that they are of, "" where it has no splits.

    With `few`, of parquet files only the groups with rows that are asked for are read or fetched.

    **Raises** `SparsightError` for what `datasets` cannot load, and for a split that is not there.
    """
    datasets = _datasets(source)
    with _loading(datasets, source):
        return _load(datasets, source, split, held_out, saved, configuration, few)


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SparsightError(f"{source}: reading it needs datasets: pip install 'sparsight[data]'") from error
    return datasets


@contextlib.contextmanager
def _loading(datasets: Any, source: str) -> Iterator[None]:
    """Turn what `datasets` raises inside the block into one line, and silence what it says."""
    try:
        with _quiet(datasets, source):
            yield
    except SparsightError:
        raise
    except Exception as error:  # a network, a file system or a script may fail in any way
        reason = first_line(error.__cause__ or error)  # the cause has the fault in the file
        advice = "" if Path(source).exists() else "; give a file or a folder that is there, or a dataset that the Hub has"
        raise SparsightError(f"{source}: cannot load this dataset: {reason}{advice}") from error


def _load(
    datasets: Any, source: str, split: str | None, held_out: bool, saved: bool, configuration: str, few: bool
) -> tuple[Rows, str]:
    if saved:
        table = datasets.load_from_disk(source)
    elif Path(source).is_file():
        table = RowGroups([source]) if few else _read_parquet(datasets, source)
    else:
        builder = datasets.load_dataset_builder(source, configuration or None)
        names = [str(name) for name in builder.info.splits or builder.config.data_files or ("train",)]
        unnamed = names == ["train"] and Path(source).is_dir() and not _names_a_split(Path(source))
        if not unnamed:
            split = choose_split(source, names, split, held_out)
        elif split is not None:
            raise SparsightError(f"{source}: has no splits, so there is no {quote(split)}; leave `split` out")
        if few and (files := _parquet_files(builder, split or "train")):
            return _rows(RowGroups(files)), split or ""
        table = datasets.load_dataset(source, configuration or None, split=split or "train")
        return _rows(table), split or ""
    if isinstance(table, datasets.DatasetDict):
        split = choose_split(source, list(table), split, held_out)
        name, _, part = split.partition("[")
        if part or "+" in name:
            raise SparsightError(f"{source}: a saved dataset is read by whole splits; give one of {', '.join(table)}")
        return _rows(table[split]), split
    if split is not None:
        raise SparsightError(f"{source}: has no splits, so there is no {quote(split)}; leave `split` out")
    return _rows(table), ""


def _read_parquet(datasets: Any, source: str) -> Any:
    from pyarrow import parquet

    if not parquet.read_metadata(source).num_rows:  # datasets fails on a file without rows
        return []
    return datasets.load_dataset("parquet", data_files=source, split="train")


@contextlib.contextmanager
def _quiet(datasets: Any, source: str) -> Iterator[None]:
    """Silence the reports of `datasets` inside the block, and for files the bars, which downloads keep."""
    level, bars = datasets.logging.get_verbosity(), datasets.utils.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if hide := bars and Path(source).exists():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if hide:
            datasets.enable_progress_bars()


def _names_a_split(folder: Path) -> bool:
    """Whether a file or a folder of parquet files is named after the training set; else `train` is only a default name."""
    return any("train" in str(path.relative_to(folder)).lower() for path in folder.rglob("*.parquet"))


def _rows(dataset: Any) -> Rows:
    table = dataset if isinstance(dataset, RowGroups) else Table(dataset)
    return [(i, partial(_record, table, i)) for i in range(len(table))]


def _record(table: Table | RowGroups, i: int) -> dict[str, Any]:
    """A row as a record: its columns that hold something. Of two that would contradict each other one is ignored."""
    try:
        row = table[i]
    except Exception as error:  # an image that does not decode
        raise BadRecord(f"cannot be read: {first_line(error)}") from error
    record = {key: value for key, value in row.items() if value is not None}
    forms = ("messages", "conversations", "prompt", "question")
    form = next((key for key in forms if key in record), "prompt")
    beside = [key for key in forms if key != form]
    beside += ["answers"] if form in ("prompt", "question") and "answer" in record else []
    beside += ["answer", "answers"] if form in ("messages", "conversations") else []
    return {f"{key} (another column is read)" if key in beside else key: value for key, value in record.items()}
