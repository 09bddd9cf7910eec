"""TextVQA: questions about text in pictures, with ten answers each.

Singh et al., "Towards VQA Models That Can Read", CVPR 2019; https://textvqa.org. No tokens of an OCR engine are given to
the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsight.tasks.release import Release
from sparsight.tasks.task import Row, Task, images_of, people


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`TextVQA_0.5.1_val.json`, with the pictures in `train_images`."""
    split = release.split(split, ("validation", "train"))
    content = release.json(f"TextVQA_*_{'val' if split == 'validation' else split}.json")
    return split, [
        {
            "id": row["question_id"], "question": row["question"], "images": [(f"{row['image_id']}.jpg",)],
            "answers": people(row.get("answers", ())),
        }
        for row in content["data"]
    ]  # fmt: skip


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/textvqa."""
    return {
        "id": row["question_id"], "question": row["question"], "images": images_of(row["image"]),
        "answers": people(row.get("answers") or ()),
    }  # fmt: skip


TEXTVQA = Task("TextVQA", "lmms-lab/textvqa", columns, official, metrics=("vqa_accuracy",))
