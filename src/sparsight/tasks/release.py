"""The files of a benchmark as they were published: annotations, pictures in whatever folder, tables with pictures inside."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight.data.tables import hub_table, parquet_table
from sparsight.errors import SparsightError, first_line, quote

DEPTH = 3  # folders below the one that is given
FOLDERS = 500  # that are looked into
_SHARD = re.compile(r"^(.+?)-\d{5}-of-\d{5}$")
_ALIASES = {"val": "validation", "valid": "validation", "val2014": "validation", "val2017": "validation"}
_ALIASES |= {"train2014": "train", "train2017": "train", "testdev_balanced": "testdev"}


def canonical(split: str) -> str:
    """The name of a split without the year and the habits of a release: `val2014` is `validation`."""
    return _ALIASES.get(split.lower(), split.lower())


class Release:
    """What `data` names for a task: the folder of a release, a table, or a name on the Hub.

    `images` is a further folder with pictures. `few`: only some rows of tables will be asked for. **Raises**
    `SparsightError` for a folder that is not there, and for a single file of one, beside which others would be read.
    """

    def __init__(self, source: str | Path, title: str, images: Path | None = None, few: bool = False) -> None:
        self.source, self.title, self.few = str(source), title, few
        path = Path(source)
        self.folder = path if path.is_dir() else path.parent if path.is_file() else None
        local = self.source.startswith((".", "/", "~")) or self.source.count("/") > 1 or path.suffix in (".parquet", ".tsv")
        if self.folder is None and local:
            raise SparsightError(f"{source}: no such file or folder")
        if path.is_file() and path.suffix not in (".parquet", ".tsv"):
            raise SparsightError(
                f"{source}: is one file of a release; give its folder, with the pictures, or a .parquet or .tsv file"
            )
        self.roots = [root for root in (self.folder, images) if root is not None]
        self.tsv = self._one(path, ".tsv")
        self.parquet = self._all(path, ".parquet")
        self._places: list[Path] | None = None

    @property
    def is_table(self) -> bool:
        """Whether rows come from a table: parquet, `.tsv`, or a name on the Hub."""
        return bool(self.parquet or self.tsv or self.folder is None)

    def _all(self, path: Path, suffix: str) -> list[Path]:
        if path.is_file():
            return [path] if path.suffix == suffix else []
        return sorted(path.rglob(f"*{suffix}")) if path.is_dir() else []

    def _one(self, path: Path, suffix: str) -> Path | None:
        files = self._all(path, suffix)
        if len(files) > 1:
            names = ", ".join(str(file.relative_to(path)) for file in files[:5])
            raise SparsightError(f"{path}: holds several {suffix} files ({names}); give one of them")
        return files[0] if files else None

    # annotations

    def split(self, split: str | None, splits: Sequence[str]) -> str:
        """The split that is asked for, else the first. **Raises** `SparsightError` for one without answers."""
        name = canonical(split or splits[0])
        if name not in splits:
            have = ", ".join(map(repr, splits))
            raise SparsightError(f"{self.source}: no split {quote(split)} with answers; {self.title} has {have}")
        return name

    def find(self, *patterns: str) -> list[Path]:
        """The files below the folder whose names match the first of some patterns that any matches."""
        assert self.folder is not None
        for pattern in patterns:
            for depth in range(DEPTH):
                if files := sorted(self.folder.glob("*/" * depth + pattern)):
                    return files
        return []

    def file(self, *patterns: str) -> Path:
        """The one file that matches. **Raises** `SparsightError` for none, and for several."""
        files = self.find(*patterns)
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files[:5])
            raise SparsightError(f"{self.source}: holds several files like {patterns[0]!r} ({names}); leave one there")
        raise SparsightError(
            f"{self.source}: has no {' or '.join(map(repr, patterns))}, as the release of {self.title} has, and no .parquet "
            "or .tsv file; give the folder of one of them"
        )

    def json(self, *patterns: str) -> Any:
        """The content of the one JSON file that matches. **Raises** `SparsightError` for what is no JSON."""
        return read_annotations(self.file(*patterns))

    # pictures

    def picture(self, *names: str) -> str:
        """The first of some paths that is there, as one that `finder` takes; each may lie in a folder further below."""
        if self._places is None:
            self._places = [Path(), *(place for root in self.roots for place in folders(root))]
        for i, place in enumerate(self._places):
            for name in names:
                if any((root / place / name).is_file() for root in self.roots):
                    self._places.insert(0, self._places.pop(i))  # the next one lies there, too
                    return str(place / name)
        return names[0]

    # tables

    def table(self, splits: Sequence[str], split: str | None, configurations: Sequence[str] = ()) -> tuple[Any, str]:
        """The rows of a table, and the split that they are of.

        Of several configurations the first that is named counts, or all of them where none is. **Raises**
        `SparsightError` for a split that is not there.
        """
        if self.tsv is not None:
            if split is not None:
                raise SparsightError(f"{self.tsv}: has no splits, so there is no {quote(split)}; leave `split` out")
            return TsvTable(self.tsv), ""
        if self.folder is None:
            return self._from_hub(splits, split, configurations)
        files = self._of_configuration(configurations)
        by_split: dict[str, list[str]] = {}
        for file in files:
            by_split.setdefault(_split_of(file, self.folder), []).append(str(file))
        name = choose(self.source, list(by_split), splits, split)
        return parquet_table(self.source, by_split[name], self.few), "" if list(by_split) == [""] else name

    def _of_configuration(self, names: Sequence[str]) -> list[Path]:
        """The parquet files of the first configuration that is there: a folder below the one that is given."""
        assert self.folder is not None
        for name in names:
            if files := [file for file in self.parquet if name in file.relative_to(self.folder).parts[:-1]]:
                return files
        return self.parquet

    def _from_hub(self, splits: Sequence[str], split: str | None, configurations: Sequence[str]) -> tuple[Any, str]:
        name, _, own = self.source.partition(":")

        def pick(names: Sequence[str]) -> str:
            return choose(self.source, names, splits, split)

        return hub_table(name, own or next(iter(configurations), ""), pick, self.few)


def choose(source: str, names: Sequence[str], splits: Sequence[str], split: str | None) -> str:
    """Of the splits that are there, the one that is asked for, else the first of a task's own, else the only one.

    **Raises** `SparsightError` where none is it.
    """
    by_name = {canonical(name): name for name in names}
    have = ", ".join(repr(name) for name in names)
    if split is not None:
        if split in names or canonical(split) in by_name:
            return split if split in names else by_name[canonical(split)]
        if list(names) == [""]:
            raise SparsightError(f"{source}: has no splits, so there is no {quote(split)}; leave `split` out")
        raise SparsightError(f"{source}: no split {quote(split)}; it has {have}")
    for name in splits:
        if name in by_name:
            return by_name[name]
    if len(names) == 1:
        return names[0]
    raise SparsightError(f"{source}: has the splits {have}, and none of {', '.join(splits)}; name one with `split`")


def _split_of(file: Path, folder: Path) -> str:
    """The split of a parquet file: the start of a shard's name, or the folder or the name that says one."""
    shard = _SHARD.match(file.stem)
    if shard:
        return shard[1].split("/")[-1]
    words = ("train", "validation", "val", "test", "testdev", "dev", "lite")
    inside = [part for part in file.relative_to(folder).parts[:-1] if part.lower() in words]
    first = re.split(r"[^A-Za-z0-9]", file.stem)[0]
    return inside[-1] if inside else first if canonical(first) in (*words, "validation") else ""


def folders(root: Path) -> Iterator[Path]:
    """Folders below `root`, relative to it, the higher ones first; no more than `FOLDERS` of them."""
    level, count = [Path()], 0
    for _ in range(DEPTH):
        below = []
        for place in level:
            with os.scandir(root / place) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
            below += [place / name for name in names]
        for place in below:
            count += 1
            if count > FOLDERS:
                return
            yield place
        level = below[:FOLDERS]


class TsvTable(Sequence[Mapping[str, Any]]):
    """The rows of a `.tsv` file, as dicts of texts; pictures stay base64.

    An `image` that is the `index` of another row, as VLMEvalKit writes repeated pictures, is replaced by that row's.
    **Raises** `SparsightError` for what is no such file.
    """

    def __init__(self, path: Path) -> None:
        limit = csv.field_size_limit(sys.maxsize)
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                self.rows = [dict(row) for row in csv.DictReader(file, delimiter="\t")]
        except (OSError, ValueError, csv.Error) as error:
            raise SparsightError(f"{path}: cannot be read as tab-separated text ({first_line(error)})") from error
        finally:
            csv.field_size_limit(limit)
        by_index = {row.get("index"): row for row in self.rows}
        for row in self.rows:
            for _ in range(2):  # a row may name one that names another
                if (other := by_index.get(row.get("image"))) is not None and other is not row:
                    row["image"] = other.get("image")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return {key: value for key, value in self.rows[index].items() if key and value not in (None, "", "nan")}

    def column(self, name: str) -> list[Any]:
        """The values of a column, in order."""
        return [row.get(name) for row in self.rows]


def read_annotations(path: Path, parse: Callable[[str], Any] = json.loads) -> Any:
    """What an annotation file holds. **Raises** `SparsightError` for what is none."""
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SparsightError(f"{path}: cannot be read ({first_line(error)}); give the file as it was published") from error


def json_lines(text: str) -> list[Any]:
    """The values of a text with one JSON value a line; a list is taken as it is."""
    if text.lstrip()[:1] == "[":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]
