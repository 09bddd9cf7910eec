"""Read samples from a file, a folder or a `datasets` name."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from sparsight.data.images import BadRecord, Find, finder
from sparsight.data.json_rows import json_rows, jsonl_rows
from sparsight.data.records import Parsed, parse
from sparsight.data.sample import Sample
from sparsight.data.tables import Rows, dataset_rows
from sparsight.errors import LINE, SparsightError, first_line, quote

_NAMES = re.compile(r"""\b(image|image path|[a-z]+\[)(?: (?:'[^']*'|"[^"]*")|\d+(?=\]))""")  # of images, places of messages
_REASONS = 5  # shown where every record is bad


@dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """Samples in the order of their source.

    `skipped` has (file, line, reason) of every record left out; `fingerprint` is a hash of all texts and image bytes,
    the same wherever the files lie. `split` is the part of a dataset that was read, "" where there are none; `ignored`
    counts records by key that is not used, `empty` the empty answers left out; `hashes` has the image hashes by sample.
    """

    items: tuple[Sample, ...]
    source: str
    fingerprint: str
    skipped: list[tuple[str, int, str]] = field(default_factory=list)
    split: str = ""
    ignored: Mapping[str, int] = field(default_factory=dict)
    empty: int = 0
    hashes: tuple[tuple[str, ...], ...] = ()

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

    @property
    def facts(self) -> dict[str, Any]:
        """What was read otherwise than as it stands there, as plain values; empty where nothing was."""
        made = {"split": self.split, "ignored_keys": dict(self.ignored), "empty_answers": self.empty}
        return {key: value for key, value in made.items() if value}


class Source:
    """A data source that is opened once: a record that was read is not read again.

    Works wherever a source does. `images` is a further folder that images may lie in; `split` and `held_out` choose a part
    of a dataset as in `read`. **Raises** `SparsightError` for what is no source.
    """

    def __init__(
        self,
        source: str | Path,
        split: str | None = None,
        *,
        images: str | Path | None = None,
        held_out: bool = False,
    ) -> None:
        self.source = str(source)
        if images is not None and not Path(images).is_dir():
            raise SparsightError(f"`images`: {images} is no folder; name the one that the images lie in")
        place = None if images is None else Path(images)
        self.chosen = split is not None or held_out  # not the default for training
        try:
            self.name, self.rows, self._find, self.split = _open(source, split, held_out, place)
        except OSError as error:  # no permission, a name too long, a device that fails
            shown = str(error.filename or source)[:LINE]
            raise SparsightError(
                f"{shown}: cannot be read ({first_line(error)}); give data that this user may read"
            ) from error
        self._records: dict[int, Parsed | BadRecord] = {}

    def __fspath__(self) -> str:
        return self.source

    def __str__(self) -> str:
        return self.source

    def record(self, position: int) -> Parsed:
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
    split: str | None = None,
    seed: int | None = None,
    images: str | Path | None = None,
    held_out: bool = False,
) -> Samples:
    """Read every sample, and check every image, of a source.

    `source` is a `.jsonl` file, a `.json` file with a list or with published annotations (VQA, COCO captions), a folder
    with `metadata.jsonl`, a `.parquet` file or a folder of them, a folder that `datasets` has saved, or the name of a
    dataset on the Hub ("name" or "name:configuration"). Unknown keys and columns are ignored and counted. A `Source` is
    opened already.

    `split` is the part of a dataset to read: by default "train", for `held_out` samples "test", else "validation", and
    never "train". Images lie beside the data, or below the folder `images`.

    `limit` takes the first good samples; with `seed` it takes random ones, the same for a seed, in the source's order.

    **Raises** `SparsightError` with FILE:LINE and the reason at the first bad record; with `skip_bad` bad records are left
    out and listed in `.skipped`. A source without any good sample is an error either way.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise SparsightError(f"limit must be a whole number of at least 1, got {quote(limit)}")
    opened = source if isinstance(source, Source) else Source(source, split, images=images, held_out=held_out)
    name, rows = opened.name, opened.rows
    if split is not None and opened.split != split:
        raise SparsightError(f"{name}: was opened for another split than {quote(split)}; open it with that")
    if held_out and opened.split and not opened.chosen:
        raise SparsightError(
            f"{name}: was opened to train on; open it with `held_out=True` to score on it, or with a `split`"
        )
    good: dict[int, Parsed] = {}
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
    skipped.sort(key=lambda entry: entry[1])
    if not good:
        why = f"; all {len(skipped)} records are bad: {reasons(reason for _, _, reason in skipped)}" if skipped else ""
        raise SparsightError(f"{name}: no samples{why}")
    usable = [good[position] for position in sorted(good)]
    ignored = Counter(key for each in usable for key in each.ignored)
    return Samples(
        tuple(each.sample for each in usable), str(source), _fingerprint(usable), skipped, opened.split,
        dict(ignored.most_common()), sum(each.empty for each in usable), tuple(each.images for each in usable),
    )  # fmt: skip


def read_with(source: str | Path | Source, spec: Any, *, held_out: bool = False, **how: Any) -> Samples:
    """Read a source by the settings of a verb; `held_out` samples by those for data to score on. **Raises** as `read`."""
    split = getattr(spec, "held_out_split", None) if held_out and hasattr(spec, "held_out_split") else spec.split
    return read(source, skip_bad=spec.skip_bad, images=spec.images, split=split, held_out=held_out, **how)


def reasons(texts: Iterable[str]) -> str:
    """Reasons with their counts, the most frequent first; those that differ in the name of an image are one."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(_NAMES.sub(r"\1", text), []).append(text)
    ordered = sorted(groups.values(), key=len, reverse=True)
    shown = [f"{same[0]} ({len(same)})" if len(same) > 1 else same[0] for same in ordered[:_REASONS]]
    rest = sum(len(same) for same in ordered[_REASONS:])
    return "; ".join([*shown, *([f"{rest} for other reasons"] if rest else [])])


def _order(n: int, seed: int | None) -> list[int]:
    order = list(range(n))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return order


def _fingerprint(samples: Sequence[Parsed]) -> str:
    digest = hashlib.sha256()
    for each in samples:
        sample = each.sample
        turns = [[turn.prompt, list(turn.answers)] for turn in sample.turns]
        facts = [sample.id, sample.kind, turns, list(each.images), *([sample.system] if sample.system else [])]
        digest.update(json.dumps(facts).encode() + b"\n")
    return digest.hexdigest()


def _open(source: str | Path, split: str | None, held_out: bool, images: Path | None) -> tuple[str, Rows, Find, str]:
    """The name of a source, its rows, how its images are found, and the split that is read."""
    if not str(source).strip():
        raise SparsightError("`data`: is an empty name; give a file, a folder or the name of a dataset")
    path = Path(source)
    if path.is_dir():
        if (path / "metadata.jsonl").is_file():
            return _open(path / "metadata.jsonl", split, held_out, images)
        marks = [path / "dataset_dict.json", path / "state.json"]
        saved = any(mark.is_file() for mark in marks)
        if saved or next(path.rglob("*.parquet"), None):
            rows, part = dataset_rows(str(path), split, held_out, saved=saved)
            return _named(source, part), rows, finder(path, images), part
        raise SparsightError(f"{source}: a data folder needs metadata.jsonl, parquet files or a saved dataset")
    if path.is_file():
        if path.suffix == ".parquet":
            rows, part = dataset_rows(str(path), split, held_out)
            return str(source), rows, finder(path.parent, images), part
        if path.suffix not in (".jsonl", ".json"):
            raise SparsightError(
                f"{source}: a data file must end in .jsonl or .json or .parquet, got {path.suffix or 'no suffix'!r}"
            )
        if split is not None:
            raise SparsightError(f"{source}: has no splits, so there is no {quote(split)}; leave `split` out")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SparsightError(f"{source}: not UTF-8 text: {error}") from error
        rows = jsonl_rows(text) if path.suffix == ".jsonl" else json_rows(text, path)
        return str(source), rows, finder(path.parent, images), ""
    if (
        path.suffix in (".jsonl", ".json", ".parquet")
        or str(source).startswith((".", "/", "~"))
        or str(source).count("/") > 1
    ):
        raise SparsightError(f"{source}: no such file or folder")
    name, _, configuration = str(source).partition(":")
    rows, part = dataset_rows(name, split, held_out, configuration=configuration)
    return _named(source, part), rows, finder(None, images), part


def _named(source: str | Path, split: str) -> str:
    return f"{source}[{split}]" if split else str(source)
