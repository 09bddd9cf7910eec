"""SEED-Bench: questions with four options in nine dimensions of single pictures; those about videos are not read.

Li et al., "SEED-Bench", CVPR 2024; https://github.com/AILab-CVC/SEED-Bench. Its own evaluation ranks the options by their
likelihood. Here the model writes a letter, and the first one of its answer counts, as in lmms-eval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sparsight.data.sample import Sample
from sparsight.tasks.release import Release
from sparsight.tasks.task import Row, Task, choice, images_of, letter_columns
from sparsight.tasks.wording import LETTER


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`SEED-Bench.json`, with the pictures in `SEED-Bench-image`."""
    release.split(split, ("test",))
    content = release.json("SEED-Bench.json")
    kinds = {number: name for name, number in content.get("question_type", {}).items()}
    rows = []
    for row in content["questions"]:
        if row["data_type"] == "image":
            kind = kinds.get(row.get("question_type_id"), row.get("question_type_id"))
            rows.append(partial(_row, row, [(row["data_id"],)], kind))
    return "test", rows


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/SEED-Bench, or of a `.tsv` with the options in columns `A` to `D`."""
    kind = row.get("category") if row.get("question_type_id") is None else row["question_type_id"]
    return _row(row, images_of(row["image"]), kind)


def _row(row: Mapping[str, Any], images: list[Any], kind: Any) -> Row:
    own = [row[f"choice_{letter}"] for letter in "abcd" if row.get(f"choice_{letter}") is not None]
    return {
        "id": row["question_id"] if "question_id" in row else row["index"], "question": row["question"], "images": images,
        "kind": "" if kind is None else kind,
        **choice(own or letter_columns(row), row["answer"]),
    }  # fmt: skip


def score(prediction: str, sample: Sample) -> float:
    """1 where the first letter of the answer is that of the right option."""
    return float(prediction.strip()[:1].lower() == sample.answers[0].lower())


SEED = Task(
    "SEED-Bench", "lmms-lab/SEED-Bench", columns, official, asks=LETTER, score=score, splits=("test",),
    only=("data_type", "image"),
)  # fmt: skip
