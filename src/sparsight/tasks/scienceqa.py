"""ScienceQA: questions of school science with two to five options; about half of them have a picture.

Lu et al., "Learn to Explain", NeurIPS 2022; https://scienceqa.github.io. Scored as LLaVA's `eval_science_qa.py` does: the
answer is a letter, begins with a letter, a full stop and a space, or says "The answer is" and a letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sparsight.data.sample import Sample
from sparsight.tasks.release import Release
from sparsight.tasks.task import LETTERS, Row, Task, choice, identity, images_of, letter_columns
from sparsight.tasks.wording import LETTER


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`problems.json` and `pid_splits.json`, with the pictures `SPLIT/ID/image.png`."""
    split = release.split(split, ("test", "validation", "train"))
    splits, name = release.json("pid_splits.json"), "val" if split == "validation" else split
    problems = release.json("problems.json")
    rows = []
    for key in splits[name]:
        row = problems[key]
        file = row.get("image")
        images = [(f"images/{name}/{key}/{file}", f"{name}/{key}/{file}", f"{key}/{file}")] if file else []
        rows.append(partial(_row, key, row, row["choices"], images))
    return split, rows


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/ScienceQA, or of a `.tsv` with the options in columns `A`, `B` and so on."""
    options = row["choices"] if row.get("choices") else letter_columns(row)
    name = row.get("index") or row.get("id") or identity(row["question"], options)
    return _row(name, row, options, images_of(row.get("image")))


def _row(name: Any, row: Mapping[str, Any], options: list[Any], images: list[Any]) -> Row:
    hint = f"Context: {row['hint']}\n" if row.get("hint") else ""
    return {
        "id": name, "question": hint + row["question"], "images": images, "kind": row.get("subject") or row.get("category"),
        **choice(options, row["answer"]),
    }  # fmt: skip


def letter(prediction: str) -> str:
    """The letter of an answer, from A to E; "" for none, and for several answers in words."""
    if prediction in tuple(LETTERS[:5]):
        return prediction
    if match := re.match(r"([A-E])\. ", prediction):
        return match[1]
    found = re.findall(r"The answer is ([A-Z]).", prediction)
    return found[0] if len(found) == 1 else ""


def score(prediction: str, sample: Sample) -> float:
    """1 for the letter of the right option."""
    return float(letter(prediction) == sample.answers[0])


SCIENCEQA = Task(
    "ScienceQA", "lmms-lab/ScienceQA", columns, official, asks=LETTER, score=score, splits=("test", "validation"),
    configurations=("ScienceQA-FULL", "ScienceQA-IMG"),
)  # fmt: skip
