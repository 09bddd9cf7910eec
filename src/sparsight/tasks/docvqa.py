"""DocVQA: questions about scanned documents, scored with ANLS.

Mathew et al., "DocVQA", WACV 2021; https://www.docvqa.org.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from sparsight.tasks.release import Release
from sparsight.tasks.task import Row, Task, images_of


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`val_v1.0.json` or `val_v1.0_withQT.json`, with the pictures in `documents`."""
    split = release.split(split, ("validation", "train"))
    part = "val" if split == "validation" else split
    content = release.json(f"{part}_v1.0.json", f"{part}_v1.0_withQT.json")
    return split, [
        {
            "id": row["questionId"], "question": row["question"], "answers": row.get("answers", []),
            "images": [(row["image"], PurePosixPath(row["image"]).name)],
        }
        for row in content["data"]
    ]  # fmt: skip


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/DocVQA."""
    return {
        "id": row["questionId"], "question": row["question"], "images": images_of(row["image"]),
        "answers": row.get("answers") or [],
    }  # fmt: skip


DOCVQA = Task(
    "DocVQA", "lmms-lab/DocVQA", columns, official, metrics=("anls",), configurations=("DocVQA",), max_new_tokens=32
)  # fmt: skip
