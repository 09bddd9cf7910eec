"""VizWiz-VQA: questions that blind people asked about pictures they took, with ten answers each.

Gurari et al., "VizWiz Grand Challenge", CVPR 2018; https://vizwiz.org. Many have the answer "unanswerable", which LLaVA's
wording tells the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsight.tasks.release import Release
from sparsight.tasks.task import Row, Task, images_of, people

WORDS = (
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase."
)


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`val.json`, with the pictures that it names."""
    split = release.split(split, ("validation", "train"))
    content = release.json("val.json" if split == "validation" else "train.json")
    return split, [
        {
            "id": row["image"], "question": row["question"], "images": [(row["image"],)],
            "answers": people(row.get("answers", ())), "kind": row.get("answer_type", ""),
        }
        for row in content
    ]  # fmt: skip


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/VizWiz-VQA."""
    return {
        "id": row["question_id"], "question": row["question"], "images": images_of(row["image"]),
        "answers": people(row.get("answers") or ()), "kind": row.get("category", ""),
    }  # fmt: skip


VIZWIZ = Task("VizWiz-VQA", "lmms-lab/VizWiz-VQA", columns, official, words={"": WORDS}, metrics=("vqa_accuracy",))
