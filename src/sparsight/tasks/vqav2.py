"""VQAv2: open questions about COCO pictures, each with ten people's answers.

Goyal et al., "Making the V in VQA Matter", CVPR 2017; https://visualqa.org. Validation is scored with the VQA accuracy; the
answers of the test splits are not published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsight.tasks.release import Release
from sparsight.tasks.task import Row, Task, images_of, people

PARTS = {"validation": "val2014", "train": "train2014"}


def read_pairs(release: Release, split: str | None, prefix: str) -> tuple[str, Iterable[Row]]:
    """The questions of one file with the annotations of another, as VQA and OK-VQA are published."""
    split = release.split(split, tuple(PARTS))
    part = PARTS[split]
    asked = release.json(f"{prefix}OpenEnded_mscoco_{part}_questions.json")["questions"]
    answers = {row["question_id"]: row for row in release.json(f"{prefix}mscoco_{part}_annotations.json")["annotations"]}
    rows = []
    for question in asked:
        name = f"COCO_{part}_{question['image_id']:012d}.jpg"
        found = answers.get(question["question_id"], {})
        rows.append(
            {
                "id": question["question_id"], "question": question["question"], "images": [(name,)],
                "answers": people(found.get("answers", ())), "kind": found.get("answer_type", ""),
            }
        )  # fmt: skip
    return split, rows


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`v2_OpenEnded_mscoco_val2014_questions.json` and its annotations, with the pictures of COCO's `val2014`."""
    return read_pairs(release, split, "v2_")


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/VQAv2, or of another table with the same columns."""
    return {
        "id": row["question_id"], "question": row["question"], "images": images_of(row["image"]),
        "answers": people(row.get("answers") or ()), "kind": row.get("answer_type", ""),
    }  # fmt: skip


VQAV2 = Task("VQAv2", "lmms-lab/VQAv2", columns, official, metrics=("vqa_accuracy",))
