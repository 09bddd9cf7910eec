"""GQA: questions made of scene graphs, with one answer each.

Hudson and Manning, "GQA", CVPR 2019; https://cs.stanford.edu/people/dorarad/gqa. Papers score the split `testdev` of the
balanced questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sparsight.errors import SparsightError
from sparsight.tasks.release import Release, canonical
from sparsight.tasks.task import Row, Task

SPLITS = ("testdev", "validation", "train")


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`testdev_balanced_questions.json`, with the pictures in `images`."""
    split = release.split(split, SPLITS)
    part = "val" if split == "validation" else split
    content = release.json(f"{part}_balanced_questions.json")
    return split, [
        {"id": name, "question": row["question"], "images": [(f"{row['imageId']}.jpg",)], "answers": [row["answer"]]}
        for name, row in content.items()
    ]


def columns(row: Mapping[str, Any]) -> Row:
    """A row of the questions, as in lmms-lab/GQA, without its picture."""
    return {"id": row["id"], "question": row["question"], "answers": [row["answer"]]}


def join(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """The questions of one configuration, `*_instructions`, with the pictures of another, `*_images`.

    **Raises** `SparsightError` where there are no pictures.
    """
    part = canonical(split or SPLITS[0])
    stem = f"{'val' if part == 'validation' else part}_balanced"
    table, part = release.table((part,), split, (f"{stem}_instructions",))
    pictures, _ = release.table((part,), None, (f"{stem}_images",))
    where = {name: i for i, name in enumerate(pictures.column("id"))}
    if not where:
        raise SparsightError(f"{release.source}: has no pictures for the questions; a folder {stem}_images holds them")

    def load(number: int) -> Row:
        row = table[number]
        place = where.get(row["imageId"])
        images = [(f"{row['imageId']}.jpg",)] if place is None else [pictures[place]["image"]]
        return {**columns(row), "images": images}

    return part, [partial(load, i) for i in range(len(table))]


GQA = Task("GQA", "lmms-lab/GQA", columns, official, metrics=("plain_match",), splits=SPLITS, join=join)
