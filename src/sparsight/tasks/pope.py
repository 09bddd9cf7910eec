"""POPE: is there such a thing in the picture? Yes or no, and how often the model says yes.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023; https://github.com/RUCAIBox/POPE.
As in its `evaluate.py`, an answer is no if its first sentence has the word "no", "No" or "not", and else yes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsight.data.sample import Sample
from sparsight.tasks.release import Release, json_lines, read_annotations
from sparsight.tasks.task import Row, Task, Whole, images_of
from sparsight.tasks.wording import YES_NO

CATEGORIES = ("random", "popular", "adversarial")


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`coco_pope_random.json`, `_popular` and `_adversarial`, those that are there, with COCO's pictures of `val2014`."""
    release.split(split, ("test",))
    rows: list[Row] = []
    for category in CATEGORIES:
        for path in release.find(f"coco_pope_{category}.json"):
            rows += [
                {
                    "id": f"{category}/{row['question_id']}", "question": row["text"], "images": [(row["image"],)],
                    "answers": [row["label"]], "kind": category,
                }
                for row in read_annotations(path, json_lines)
            ]  # fmt: skip
    if not rows:
        release.file("coco_pope_random.json", "coco_pope_popular.json", "coco_pope_adversarial.json")
    return "test", rows


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/POPE."""
    category = row.get("category", "")
    name = f"{category}/{row['question_id']}" if category else row["question_id"]
    return {
        "id": name, "question": row["question"], "images": images_of(row["image"]), "answers": [row["answer"]],
        "kind": category,
    }  # fmt: skip


def says_yes(prediction: str) -> bool:
    """Whether an answer counts as a yes."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return not {"no", "No", "not"} & set(words)


def score(prediction: str, sample: Sample) -> float:
    """1 for the right one of yes and no."""
    return float(says_yes(prediction) == (sample.answers[0].strip().lower() != "no"))


def parts(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """True and false yes, true and false no, of every question."""
    made = []
    for row in rows:
        yes, right = says_yes(row["prediction"]), row["answers"][0].strip().lower() != "no"
        made.append([float(yes and right), float(yes and not right), float(not yes and not right), float(not yes and right)])
    return made


def values(sums: Any) -> dict[str, Any]:
    """F1, precision and recall of yes, and the share of yes; 0 where nothing is divided by."""
    tp, fp, tn, fn = (sums[..., i] for i in range(4))

    def ratio(above: Any, below: Any) -> Any:
        return np.divide(above, below, out=np.zeros_like(np.asarray(above, dtype=float)), where=np.asarray(below) > 0)

    return {
        "f1": ratio(2 * tp, 2 * tp + fp + fn), "precision": ratio(tp, tp + fp), "recall": ratio(tp, tp + fn),
        "yes_ratio": ratio(tp + fp, tp + fp + tn + fn),
    }  # fmt: skip


POPE = Task(
    "POPE", "lmms-lab/POPE", columns, official, asks=YES_NO, score=score, whole=Whole(parts, values), splits=("test",)
)  # fmt: skip
