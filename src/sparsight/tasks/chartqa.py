"""ChartQA: questions about charts, whose numbers may be off by 5 %.

Masry et al., "ChartQA", Findings of ACL 2022; https://github.com/vis-nlp/ChartQA. Kinds are the questions that people
wrote and those that were made by a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsight.tasks.release import Release, read_annotations
from sparsight.tasks.task import Row, Task, identity, images_of


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`test_human.json` and `test_augmented.json`, those that are there, with the pictures in `png`."""
    split = release.split(split, ("test", "validation", "train"))
    part = "val" if split == "validation" else split
    rows: list[Row] = []
    for kind in ("human", "augmented"):
        for path in release.find(f"{part}_{kind}.json"):
            for i, row in enumerate(read_annotations(path)):
                name = row["imgname"]
                rows.append(
                    {
                        "id": f"{kind}/{i}", "question": row["query"], "answers": [row["label"]], "kind": kind,
                        "images": [(f"{part}/png/{name}", f"png/{name}", name)],
                    }
                )  # fmt: skip
    if not rows:
        release.file(f"{part}_human.json", f"{part}_augmented.json")
    return split, rows


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/ChartQA, or of HuggingFaceM4/ChartQA, whose columns are `query` and `label`."""
    question = row["query"] if "query" in row else row["question"]
    answer = row["label"] if "query" in row else row["answer"]
    kind = row.get("type") or {0: "human", 1: "augmented"}.get(row.get("human_or_machine", -1), "")
    answers = answer if isinstance(answer, list) else [answer]
    return {
        "id": identity(question, answers, kind), "question": question, "images": images_of(row["image"]), "answers": answers,
        "kind": str(kind).removesuffix("_test"),
    }  # fmt: skip


CHARTQA = Task(
    "ChartQA", "lmms-lab/ChartQA", columns, official, metrics=("relaxed_accuracy",), splits=("test", "validation")
)  # fmt: skip
