"""A benchmark: how its files become samples, how it is asked, and what its answers are worth.

A task's file has two small functions. `official(release, split)` gives the split and the rows of the files as they were
published, and `columns(row)` turns a row of its tables (parquet as on the Hub, `.tsv`) into the same: a dict with
"question", "answers" and, where there are some, "images", "options", "kind" and "id", or a function that makes one. An
image that is a tuple of names is looked for in the folders of the release.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sparsight.data.images import BadRecord, Find, Finder, kind_of
from sparsight.data.records import Parsed
from sparsight.data.sample import PLACEHOLDER, Sample, Turn, Wording
from sparsight.data.tables import Rows
from sparsight.errors import SparsightError, first_line, quote
from sparsight.tasks.release import Release
from sparsight.tasks.wording import CAPTION, LETTER, SHORT, check_prompt, decoding, wording

Row = Any  # a dict, or a function that makes one
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Whole:
    """Scores of all samples together, which are no means of samples.

    `parts(rows)` gives for every unit that is drawn as one, a sample or the questions about one image, a list of numbers,
    from rows {"id", "kind", "prediction", "answers"}; `values(sums)` the scores by name from the sums of those numbers,
    an array (..., numbers), and is asked for many sums at once.
    """

    parts: Callable[[Sequence[Mapping[str, Any]]], list[list[float]]]
    values: Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    `hub` is its dataset on the Hub, of which `configurations` are read. `asks` is the kind of question, whose wording and
    decoding are in `wording.py`; `words` are wordings of the task's own, by model type. Answers are scored by `metrics`,
    names in the table of metrics, or by `score(prediction, sample)`. `splits` are read where none is named, the first
    that is there. `join` reads the rows of a table where pictures stand in another one; `only` is a column and the
    value of it that is read. `complete`: the scores need all samples.
    """

    title: str
    hub: str
    columns: Callable[[Mapping[str, Any]], Row]
    official: Callable[[Release, str | None], tuple[str, Iterable[Row]]] | None = None
    asks: str = SHORT
    words: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    score: Callable[[str, Sample], float] | None = None
    whole: Whole | None = None
    splits: tuple[str, ...] = ("validation",)
    configurations: tuple[str, ...] = ()
    join: Callable[[Release, str | None], tuple[str, Iterable[Row]]] | None = None
    only: tuple[str, Any] | None = None
    max_new_tokens: int | None = None
    complete: bool = False

    def open(
        self, source: str | Path | None, split: str | None, images: Path | None, prompt: str | None, few: bool = False
    ) -> tuple[str, Rows, Find, str, Callable[[Any, int, Find], Parsed]]:
        """The name of a source, its rows, how pictures are found, the split, and the function that makes samples.

        `few`: only some rows of tables will be asked for.

        **Raises** `SparsightError` for files that are not those of the task, for a split that is not there, and for a
        prompt that would lose the question.
        """
        if prompt is not None:
            check_prompt(prompt, self.asks)
        release = Release(source or self.hub, self.title, images, few)
        if not release.is_table:
            if self.official is None:
                raise SparsightError(f"{source}: {self.title} is published as parquet files, and there are none here")
            part, loads = self._annotated(self.official, release, split)
        elif self.join is not None and release.tsv is None:
            part, loads = self._annotated(self.join, release, split)
        else:
            table, part = release.table(self.splits, split, self.configurations)
            numbers: Sequence[int] = range(len(table))
            if self.only is not None and (values := table.column(self.only[0])):
                numbers = [i for i in numbers if values[i] in (self.only[1], None)]
            loads = [(i, partial(self._load, lambda i=i: self.columns(table[i]))) for i in numbers]
        if not loads:
            raise SparsightError(f"{release.source}: holds no question of {self.title}")
        words = {asks: wording(asks, self.words, prompt) for asks in (self.asks, SHORT)}
        name = f"{release.source}[{part}]" if part else release.source
        return name, loads, self._find(release, images), part, partial(self.sample, words)

    def _annotated(self, read: Callable, release: Release, split: str | None) -> tuple[str, list[tuple[int, Any]]]:
        """The split and the rows that a task's own reader gives, numbered."""
        try:
            part, rows = read(release, split)
            return part, [(i, partial(self._load, row)) for i, row in enumerate(rows)]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise SparsightError(
                f"{release.source}: is not as {self.title} is published ({type(error).__name__}: {first_line(error)}); give "
                "its files without changes"
            ) from error

    def _load(self, row: Row) -> dict[str, Any]:
        try:
            return row() if callable(row) else row
        except KeyError as error:
            raise BadRecord(f"has no {error}, as {self.title} has") from error
        except (TypeError, AttributeError, ValueError) as error:
            if isinstance(error, BadRecord):
                raise
            raise BadRecord(f"is not as {self.title} has it: {first_line(error)}") from error

    def _find(self, release: Release, images: Path | None) -> Find:
        return Finder(release.folder, images, release.picture)

    def sample(self, words: Mapping[str, Wording], row: dict[str, Any], number: int, find: Find) -> Parsed:
        """The sample of a row. **Raises** `BadRecord` for one without a question or answers, or with a broken picture."""
        options = tuple(_text(option, "an option") for option in row.get("options") or ())
        asks = self.asks if self.asks != LETTER or options else SHORT
        question = row.get("question")
        if asks == CAPTION:
            question = CAPTION
        if not isinstance(question, str) or not question.strip():
            raise BadRecord(f"the question must be a text, got {kind_of(question)}")
        answers = tuple(_text(answer, "an answer").strip() for answer in row.get("answers") or ())
        if not any(answers):
            raise BadRecord(
                f"has no answer to score by; those of some splits of {self.title} are not published: name another split"
            )
        pictures = [find(entry) for entry in row.get("images") or ()]
        question = question.replace(PLACEHOLDER, "").strip()
        sample = Sample(
            str(row.get("id", number)), tuple(image for image, _ in pictures), (Turn(question, answers),),
            "" if row.get("kind") is None else str(row["kind"]), "", options, words[asks],
        )  # fmt: skip
        return Parsed(sample, tuple(digest for _, digest in pictures))

    def decoding(self, model_type: str) -> Any:
        """How a model of a type writes the answers."""
        way = decoding(self.asks, model_type)
        if self.max_new_tokens is None or way.beams > 1:
            return way
        return type(way)(way.beams, way.length_penalty, self.max_new_tokens)


def choice(options: Sequence[Any], answer: Any) -> dict[str, Any]:
    """The options of a question, and its answer as a letter, where it may be a letter or a place from 0."""
    if not isinstance(options, list | tuple) or not options:
        raise BadRecord(f"its options must be a list, got {kind_of(options)}")
    text = str(answer).strip()
    place = int(text) if text.isdecimal() else LETTERS.find(text.upper()) if len(text) == 1 else -1
    if not 0 <= place < len(options):
        raise BadRecord(f"its answer {quote(answer)} is none of its {len(options)} options")
    return {"options": [str(option) for option in options], "answers": [LETTERS[place]]}


def letter_columns(row: Mapping[str, Any]) -> list[str]:
    """The options that stand in columns of their own, `A`, `B` and so on, as in VLMEvalKit's tables."""
    options = []
    for letter in LETTERS:
        if row.get(letter) in (None, "", "nan"):
            break
        options.append(str(row[letter]))
    return options


def people(answers: Iterable[Any]) -> list[str]:
    """People's answers, as texts or as `{"answer": ...}`; an empty one stays, as one that nobody matches."""
    return [str(answer["answer"] if isinstance(answer, Mapping) else answer) for answer in answers]


def images_of(image: Any) -> list[Any]:
    """The picture of a table's row: base64 in `.tsv` files, what the column holds in parquet."""
    if image is None:
        return []
    return [{"bytes": image}] if isinstance(image, str) else list(image) if isinstance(image, list) else [image]


def identity(*parts: Any) -> str:
    """A short name of a row that has none, the same wherever it stands."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _text(value: Any, noun: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecord(f"{noun} must be a text, got {kind_of(value)}")
    return str(value)
