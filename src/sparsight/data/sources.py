"""Read samples from a JSONL file, a LLaVA JSON list, a folder with metadata.jsonl or a `datasets` name."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, overload

from sparsight.data.records import BadRecord, Find, finder, in_memory, parse
from sparsight.data.sample import Sample
from sparsight.errors import SparsightError

_SPACE = re.compile(r"\s*")

Rows = Sequence[tuple[int, Callable[[], Any]]]  # a line, or a row of a table, and the function that reads its record


@dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """Samples in the order of their source.

    `skipped` has (file, line, reason) of every record left out; `fingerprint` is a hash of all texts and image bytes,
    the same wherever the files lie.
    """

    items: tuple[Sample, ...]
    source: str
    fingerprint: str
    skipped: list[tuple[str, int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, index: int | slice) -> Sample | tuple[Sample, ...]:
        return self.items[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.items)


class Source:
    """A data source that is opened once: a record that was read is not read again.

    Works wherever a source does. **Raises** `SparsightError` for what is no source.
    """

    def __init__(self, source: str | Path, split: str = "train") -> None:
        self.source = str(source)
        self.name, self.rows, self._find = _open(source, split)
        self._records: dict[int, tuple[Sample, tuple[str, ...]] | BadRecord] = {}

    def __fspath__(self) -> str:
        return self.source

    def __str__(self) -> str:
        return self.source

    def record(self, position: int) -> tuple[Sample, tuple[str, ...]]:
        """The sample in a place, and hashes of its images. **Raises** `BadRecord` for what is none."""
        if position not in self._records:
            number, load = self.rows[position]
            try:
                self._records[position] = parse(load(), number, self._find)
            except BadRecord as bad:
                self._records[position] = bad
        record = self._records[position]
        if isinstance(record, BadRecord):
            raise record
        return record


def read(
    source: str | Path | Source,
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    split: str = "train",
    seed: int | None = None,
) -> Samples:
    """Read every sample, and check every image, of a source.

    `source` is a `.jsonl` file, a `.json` file with a list, a folder with `metadata.jsonl`, a folder that `datasets`
    has saved or with parquet files, or the name of a dataset on the Hub ("name" or "name:configuration"). For the last
    two `split` selects a part, and unknown columns are ignored; `question` counts as `prompt`. A `Source` is opened already.

    `limit` takes the first good samples; with `seed` it takes random ones, the same for a seed, in the source's order.

    **Raises** `SparsightError` with FILE:LINE and the reason at the first bad record; with `skip_bad` bad records are left
    out and listed in `.skipped`. A source without any good sample is an error either way.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise SparsightError(f"limit must be a whole number of at least 1, got {limit!r}")
    opened = source if isinstance(source, Source) else Source(source, split)
    name, rows = opened.name, opened.rows
    good: dict[int, tuple[Sample, tuple[str, ...]]] = {}
    skipped: list[tuple[str, int, str]] = []
    for position in _order(len(rows), seed):
        if limit is not None and len(good) == limit:
            break
        number = rows[position][0]
        try:
            good[position] = opened.record(position)
        except BadRecord as bad:
            if not skip_bad:
                raise SparsightError(f"{name}:{number}: {bad}") from bad
            skipped.append((name, number, str(bad)))
    if not good:
        raise SparsightError(f"{name}: no samples" + (f"; all {len(skipped)} records are bad" if skipped else ""))
    usable = [good[position] for position in sorted(good)]
    skipped.sort(key=lambda entry: entry[1])
    return Samples(tuple(sample for sample, _ in usable), str(source), _fingerprint(usable), skipped)


def _order(n: int, seed: int | None) -> list[int]:
    order = list(range(n))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return order


def _fingerprint(samples: list[tuple[Sample, tuple[str, ...]]]) -> str:
    digest = hashlib.sha256()
    for sample, images in samples:
        turns = [[turn.prompt, list(turn.answers)] for turn in sample.turns]
        digest.update(json.dumps([sample.id, sample.kind, turns, list(images)]).encode() + b"\n")
    return digest.hexdigest()


def _open(source: str | Path, split: str) -> tuple[str, Rows, Find]:
    path = Path(source)
    if path.is_dir():
        if (path / "metadata.jsonl").is_file():
            return _open(path / "metadata.jsonl", split)
        marks = [path / "dataset_dict.json", path / "state.json"]
        if any(mark.is_file() for mark in marks):
            return str(source), _dataset_rows(str(path), split, saved=True), in_memory
        if next(path.rglob("*.parquet"), None):
            return str(source), _dataset_rows(str(path), split), in_memory
        raise SparsightError(f"{source}: a data folder needs metadata.jsonl, parquet files or a saved dataset")
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise SparsightError(f"{source}: a data file must end in .jsonl or .json, got {path.suffix or 'no suffix'!r}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SparsightError(f"{source}: not UTF-8 text: {error}") from error
        rows = _jsonl_rows(text) if path.suffix == ".jsonl" else _json_rows(text, source)
        return str(source), rows, finder(path.parent)
    if path.suffix in (".jsonl", ".json") or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise SparsightError(f"{source}: no such file or folder")
    name, _, configuration = str(source).partition(":")
    return str(source), _dataset_rows(name, split, configuration=configuration), in_memory


def _jsonl_rows(text: str) -> Rows:
    lines = text.removeprefix("\ufeff").split("\n")  # not splitlines(): a string may hold U+2028
    return [(number, partial(_decode, line)) for number, line in enumerate(lines, 1) if line.strip()]


def _decode(line: str) -> Any:
    try:
        record = json.loads(line)
        if "\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRecord("half of a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from error
    return record


def _json_rows(text: str, source: str | Path) -> Rows:
    """Split a JSON list into its items, each with the line where it starts."""
    text = text.removeprefix("\ufeff")
    decoder, items = json.JSONDecoder(), []
    at = _skip_space(text, 0)
    try:
        if text[at : at + 1] != "[":
            raise SparsightError(f"{source}: a .json file must hold a list of records; for one record a line use .jsonl")
        at = _skip_space(text, at + 1)
        while text[at : at + 1] != "]":
            _, end = decoder.raw_decode(text, at)
            items.append((at, end))
            at = _skip_space(text, end)
            if text[at : at + 1] == ",":
                at = _skip_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    except (ValueError, RecursionError) as error:
        line = 1 + text.count("\n", 0, error.pos if isinstance(error, json.JSONDecodeError) else at)
        raise SparsightError(f"{source}:{line}: not JSON: {error}") from error
    rows, line, last = [], 1, 0
    for start, end in items:
        line, last = line + text.count("\n", last, start), start
        rows.append((line, partial(_decode, text[start:end])))
    return rows


def _skip_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too


def _dataset_rows(source: str, split: str, *, saved: bool = False, configuration: str = "") -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise SparsightError(f"{source}: reading it needs datasets: pip install 'sparsight[data]'") from error
    try:
        if saved:
            table = datasets.load_from_disk(source)
        else:
            table = datasets.load_dataset(source, configuration or None, split=split)
    except Exception as error:  # a network, a file system or a script may fail in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SparsightError(f"{source}: cannot load this dataset: {reason}") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise SparsightError(f"{source}: no split {split!r}; it has {', '.join(map(repr, table))}")
        table = table[split]
    return [(i, partial(_dataset_record, table, i)) for i in range(len(table))]


def _dataset_record(table: Any, i: int) -> dict[str, Any]:
    try:
        row = table[i]
    except Exception as error:  # an image that does not decode
        raise BadRecord(f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if "prompt" not in row and "question" in row:
        row["prompt"] = row["question"]
    forms = ("messages", "conversations", "prompt")
    form = next((key for key in forms if row.get(key) is not None), "prompt")
    columns = ("image", "images", "id", "kind", form, *(("answer", "answers") if form == "prompt" else ()))
    record = {key: row[key] for key in columns if row.get(key) is not None}
    if "answer" in record:
        record.pop("answers", None)
    return record
