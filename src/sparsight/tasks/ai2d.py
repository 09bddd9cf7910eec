"""AI2D: questions with four options about diagrams of school books.

Kembhavi et al., "A Diagram is Worth a Dozen Images", ECCV 2016; https://allenai.org/data/diagrams. Scored as in lmms-eval:
the answer is the letter up to case and punctuation, or begins with it and a full stop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sparsight.data.sample import Sample
from sparsight.errors import SparsightError
from sparsight.tasks.release import Release, canonical, read_annotations
from sparsight.tasks.task import Row, Task, choice, identity, images_of, letter_columns
from sparsight.tasks.wording import LETTER


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`questions/X.png.json`, with `images/X.png`; of the test set where `ai2d_test_ids.csv` is there.

    **Raises** `SparsightError` for a split that nothing tells apart.
    """
    files = release.find("*.png.json", "*.jpg.json")
    if not files:
        release.file("questions/0.png.json")
    files.sort(key=lambda path: (len(path.name), path.name))
    ids = release.find("ai2d_test_ids.csv")
    test = set(read_annotations(ids[0], str.split)) if ids else set()
    if split is not None and not (test and canonical(split) in ("test", "train")):
        raise SparsightError(f"{release.source}: no split {split!r}; put ai2d_test_ids.csv there, or leave `split` out")
    part = canonical(split or "test") if test else ""
    files = [path for path in files if not test or (path.name.split(".")[0] in test) == (part == "test")]
    return part, [row for path in files for row in _questions(path)]


def _questions(path: Path) -> list[Row]:
    content = read_annotations(path)
    name = content.get("imageName", path.name.removesuffix(".json"))
    return [partial(_row, name, i, *pair) for i, pair in enumerate(content["questions"].items())]


def _row(name: str, number: int, question: str, row: Mapping[str, Any]) -> Row:
    return {
        "id": row.get("questionId", f"{name}-{number}"), "question": question, "images": [(f"images/{name}", name)],
        **choice(row["answerTexts"], row["correctAnswer"]),
    }  # fmt: skip


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/ai2d, or of a `.tsv` with the options in columns `A` to `D`."""
    options = row["options"] if row.get("options") else letter_columns(row)
    return {
        "id": row.get("index") or identity(row["question"], options), "question": row["question"],
        "images": images_of(row["image"]), **choice(options, row["answer"]),
    }  # fmt: skip


def score(prediction: str, sample: Sample) -> float:
    """1 for the letter of the right option."""
    match = re.match(r"\s*([A-Z])\.", prediction)
    text = match[1] if match else prediction
    return float(re.sub(r"[!-/:-@\[-`{-~]", "", text).lower() == sample.answers[0].lower())


AI2D = Task("AI2D", "lmms-lab/ai2d", columns, official, asks=LETTER, score=score, splits=("test",))
