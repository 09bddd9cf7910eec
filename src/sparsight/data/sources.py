"""Read samples from a file, a folder or a `datasets` name."""

from __future__ import annotations

import hashlib
import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from sparsight.checks import check_name
from sparsight.data.images import BadRecord, Find, finder
from sparsight.data.json_rows import json_rows, jsonl_rows
from sparsight.data.records import Parsed, parse
from sparsight.data.row_groups import release
from sparsight.data.sample import Sample
from sparsight.data.tables import Rows, dataset_rows
from sparsight.errors import LINE, Notice, SparsightError, first_line, quote
from sparsight.fields import TASKS
from sparsight.options import read_table

_NAMES = re.compile(r"""\b(image|image path|[a-z]+\[)(?: (?:'[^']*'|"[^"]*")|\d+(?=\]))""")  # of images, places of messages
_REASONS = 5  # shown where every record is bad


@dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """Samples in the order of their source.

    `skipped` has (file, line, reason) of every record left out; `fingerprint` is a hash of all texts and image bytes,
    the same wherever the files lie. `split` is the part of a dataset that was read, "" where there are none; `ignored`
    counts records by key that is not used, `empty` the empty answers left out; `hashes` has the image hashes by sample.
    `task` is the name of the benchmark that they are of, "" for other data. `late` counts the pictures that were not
    decoded: a broken one among them is named when it is used.
    """

    items: tuple[Sample, ...]
    source: str
    fingerprint: str
    skipped: list[tuple[str, int, str]] = field(default_factory=list)
    split: str = ""
    ignored: Mapping[str, int] = field(default_factory=dict)
    empty: int = 0
    hashes: tuple[tuple[str, ...], ...] = ()
    task: str = ""
    late: int = 0

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
        made: dict[str, Any] = {"task": self.task, "split": self.split}
        made |= {"ignored_keys": dict(self.ignored), "empty_answers": self.empty}
        without = len(self.items) if self.items and not any(sample.images for sample in self.items) else 0
        made |= {"without_images": without, "pictures_not_decoded": self.late}
        return {key: value for key, value in made.items() if value}


class Source:
    """A data source that is opened once: a record that was read is not read again.

    Works wherever a source does. `images` is a further folder that images may lie in; `split` and `held_out` choose a part
    of a dataset as in `read`, and `task` and `prompt` a benchmark and how it is asked. `few`: only some samples will be
    asked for, so of parquet files nothing else is fetched. **Raises** `SparsightError` for what is no source.
    """

    def __init__(
        self,
        source: str | Path | None,
        split: str | None = None,
        *,
        images: str | Path | None = None,
        held_out: bool = False,
        task: str | None = None,
        prompt: str | None = None,
        few: bool = False,
    ) -> None:
        self.task, self.prompt = task or "", prompt
        tasks = read_table(TASKS) if task else {}
        if task:
            check_name("task", task, tuple(tasks))
        elif source is None or prompt is not None:
            field, noun = ("data", "a file or a folder") if source is None else ("task", "the benchmark that it is for")
            raise SparsightError(f"`{field}`: is missing; give {noun}")
        self.source = str(source if source is not None else tasks[task].hub)
        if images is not None and not Path(images).is_dir():
            raise SparsightError(f"`images`: {images} is no folder; name the one that the images lie in")
        place = None if images is None else Path(images)
        self.chosen = split is not None or held_out or bool(task)  # not the default for training
        self._parse: Callable[[Any, int, Find], Parsed] = parse
        try:
            if task:
                self.name, self.rows, self._find, self.split, self._parse = tasks[task].open(
                    source, split, place, prompt, few
                )
            else:
                self.name, self.rows, self._find, self.split = _open(self.source, split, held_out, place, few)
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

    @property
    def late(self) -> set[str]:
        """Hashes of the pictures that were not decoded."""
        return getattr(self._find, "late", set())

    def record(self, position: int) -> Parsed:
        """The sample in a place, and hashes of its images. **Raises** `BadRecord` for what is none."""
        if position not in self._records:
            number, load = self.rows[position]
            try:
                self._records[position] = self._parse(load(), number, self._find)
            except BadRecord as bad:
                self._records[position] = bad
        record = self._records[position]
        if isinstance(record, BadRecord):
            raise record
        return record


def read(
    source: str | Path | Source | None,
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    split: str | None = None,
    seed: int | None = None,
    images: str | Path | None = None,
    held_out: bool = False,
    task: str | None = None,
    prompt: str | None = None,
) -> Samples:
    """Read every sample, and check every image, of a source.

    `source` is a `.jsonl` file, a `.json` file with a list or with published annotations (VQA, COCO captions), a folder
    with `metadata.jsonl`, a `.parquet` file or a folder of them, a folder that `datasets` has saved, or the name of a
    dataset on the Hub ("name" or "name:configuration"). Unknown keys and columns are ignored and counted. A `Source` is
    opened already.

    `split` is the part of a dataset to read: by default "train", for `held_out` samples "test", else "validation", and
    never "train". Images lie beside the data, or below the folder `images`.

    `task` names a benchmark: `source` is then the folder of its release, its parquet files, a `.tsv` file, or None for its
    dataset on the Hub, and the split that the benchmark is scored on is read. Its samples have a `wording`, by which a
    model is asked in the words of its type, or in those of `prompt`, a text with `{question}` and `{options}`.

    `limit` takes the first good samples; with `seed` it takes random ones, the same for a seed, in the source's order. Of
    parquet files, on the Hub too, only the groups of rows that hold them are read.

    **Raises** `SparsightError` with FILE:LINE and the reason at the first bad record; with `skip_bad` bad records are left
    out and listed in `.skipped`. A source without any good sample is an error either way.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise SparsightError(f"limit must be a whole number of at least 1, got {quote(limit)}")
    opened = source if isinstance(source, Source) else Source(
        source, split, images=images, held_out=held_out, task=task, prompt=prompt, few=limit is not None
    )  # fmt: skip
    name, rows = opened.name, opened.rows
    if task is not None and (opened.task, opened.prompt) != (task, prompt):
        raise SparsightError(f"{name}: was not opened as the task {quote(task)}; open it with the same `task` and `prompt`")
    if opened.task and limit is not None and read_table(TASKS)[opened.task].complete:
        raise SparsightError(f"`samples`: {opened.task} scores questions about an image together; leave it out")
    if split is not None and opened.split != split:
        raise SparsightError(f"{name}: was opened for another split than {quote(split)}; open it with that")
    if held_out and opened.split and not opened.chosen:
        raise SparsightError(
            f"{name}: was opened to train on; open it with `held_out=True` to score on it, or with a `split`"
        )
    good: dict[int, Parsed] = {}
    skipped: list[tuple[str, int, str]] = []
    order, at = _order(len(rows), seed), 0
    while at < len(order) and (limit is None or len(good) < limit):
        part = order[at:] if limit is None else order[at : at + limit - len(good)]
        at += len(part)
        for position in sorted(part):  # rows that lie side by side are read together
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
    late = len(opened.late.intersection(digest for each in usable for digest in each.images))
    if late:
        warnings.warn(
            f"{name}: {late:,} pictures are not decoded yet, only looked at; a broken one is named when it is used",
            Notice,
            2,
        )
    ignored = Counter(key for each in usable for key in each.ignored)
    samples = Samples(
        tuple(each.sample for each in usable), str(opened), _fingerprint(usable), skipped, opened.split,
        dict(ignored.most_common()), sum(each.empty for each in usable), tuple(each.images for each in usable),
        opened.task, late,
    )  # fmt: skip
    del opened, rows  # with the rows of a table that were read last
    release()
    return samples


def read_with(source: str | Path | Source | None, spec: Any, *, held_out: bool = False, **how: Any) -> Samples:
    """Read a source by the settings of a verb; `held_out` samples by those for data to score on. **Raises** as `read`."""
    prefix = "held_out_" if held_out and hasattr(spec, "held_out_split") else ""
    how |= {name: getattr(spec, prefix + name, None) for name in ("split", "task", "prompt")}
    return read(source, skip_bad=spec.skip_bad, images=spec.images, held_out=held_out, **how)


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
        facts += [list(sample.options)] if sample.options else []
        digest.update(json.dumps(facts).encode() + b"\n")
    return digest.hexdigest()


def _open(
    source: str, split: str | None, held_out: bool, images: Path | None, few: bool = False
) -> tuple[str, Rows, Find, str]:
    """The name of a source, its rows, how its images are found, and the split that is read."""
    if not str(source).strip():
        raise SparsightError("`data`: is an empty name; give a file, a folder or the name of a dataset")
    path = Path(source)
    if path.is_dir():
        if (path / "metadata.jsonl").is_file():
            return _open(str(path / "metadata.jsonl"), split, held_out, images)
        marks = [path / "dataset_dict.json", path / "state.json"]
        saved = any(mark.is_file() for mark in marks)
        if saved or next(path.rglob("*.parquet"), None):
            rows, part = dataset_rows(str(path), split, held_out, saved=saved, few=few)
            return _named(source, part), rows, finder(path, images), part
        raise SparsightError(f"{source}: a data folder needs metadata.jsonl, parquet files or a saved dataset")
    if path.is_file():
        if path.suffix == ".parquet":
            rows, part = dataset_rows(str(path), split, held_out, few=few)
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
    rows, part = dataset_rows(name, split, held_out, configuration=configuration, few=few)
    return _named(source, part), rows, finder(None, images), part


def _named(source: str | Path, split: str) -> str:
    return f"{source}[{split}]" if split else str(source)
