"""MME: two questions about every picture, one to be answered with yes and one with no, in 14 categories.

Fu et al., "MME", arXiv 2306.13394. The score of a category is its accuracy and its accuracy of pairs, in percent, added up;
perception is the sum of ten categories and cognition of four. As in its `calculation.py`, an answer is "yes" or "no" in
lower case, or has one of them among its first four letters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from sparsight.data.images import BadRecord
from sparsight.data.sample import Sample
from sparsight.errors import SparsightError
from sparsight.tasks.release import Release, folders, read_annotations
from sparsight.tasks.task import Row, Task, Whole, identity, images_of
from sparsight.tasks.wording import YES_NO

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_ASK = "Please answer yes or no."


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`CATEGORY/x.txt`, a question, a tab and an answer a line, with `x.jpg` or `x.png` beside it or in `images`.

    **Raises** `SparsightError` where no folder is named after a category.
    """
    release.split(split, ("test",))
    assert release.folder is not None
    places = [place for place in folders(release.folder) if place.name in (*PERCEPTION, *COGNITION)]
    rows: list[Row] = []
    for place in places:
        within = release.folder / place
        beside = within / "questions_answers_YN"
        for path in sorted((beside if beside.is_dir() else within).glob("*.txt")):
            names = tuple(str(place / part / f"{path.stem}{end}") for part in ("", "images") for end in (".jpg", ".png"))
            for line in read_annotations(path, str.splitlines):
                question, tab, answer = line.strip().rpartition("\t")
                if tab:
                    rows.append(partial(_row, f"{place.name}/{path.stem}", question, [names], answer, place.name))
    if not rows:
        raise SparsightError(
            f"{release.source}: has no folders such as existence, count and position with .txt files of questions; give the "
            "folder of MME's release, or its parquet files"
        )
    return "test", rows


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/MME."""
    name = str(row["question_id"]).rpartition(".")[0] or str(row["question_id"])
    category = row["category"]
    name = name if name.startswith(category) else f"{category}/{name}"
    return _row(name, row["question"], images_of(row["image"]), row["answer"], category)


def _row(picture: str, question: str, images: list[Any], answer: str, category: str) -> Row:
    answer = answer.strip().lower().replace(".", "")
    if answer not in ("yes", "no"):
        raise BadRecord(f"its answer must be Yes or No, got {answer!r}")
    question = question.replace(_ASK, "").strip()
    return {
        "id": f"{picture}#{identity(question)}", "question": question, "images": images, "answers": [answer],
        "kind": category,
    }  # fmt: skip


def label(prediction: str) -> str:
    """Which of yes, no and other an answer is."""
    text = prediction.lower()
    return text if text in ("yes", "no") else next((word for word in ("yes", "no") if word in text[:4]), "other")


def score(prediction: str, sample: Sample) -> float:
    """1 for the right one of yes and no."""
    return float(label(prediction) == sample.answers[0])


def parts(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """For every picture, the right answers and the pairs of them, and the questions and pairs, by category."""
    pictures: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        pictures.setdefault(row["id"].partition("#")[0], []).append(row)
    made = []
    for pair in pictures.values():
        right = [label(row["prediction"]) == row["answers"][0] for row in pair]
        numbers = np.zeros((len(PERCEPTION) + len(COGNITION), 4))
        if pair[0]["kind"] in (*PERCEPTION, *COGNITION):
            at = (*PERCEPTION, *COGNITION).index(pair[0]["kind"])
            numbers[at] = sum(right), len(right), all(right), 1
        made.append([*numbers.ravel(), float(all(right)), 1.0])
    return made


def values(sums: Any) -> dict[str, Any]:
    """The scores of perception and cognition, as far as there are questions of them, and the share of pairs."""
    sums = np.asarray(sums)
    categories = sums[..., :-2].reshape(*sums.shape[:-1], -1, 4)
    right, asked, both, pairs = np.moveaxis(categories, -1, 0)
    each = 100 * (right / np.maximum(asked, 1) + both / np.maximum(pairs, 1))
    cut = len(PERCEPTION)
    made = {"pair_accuracy": sums[..., -2] / sums[..., -1]}
    for name, part in (("perception", slice(0, cut)), ("cognition", slice(cut, None))):
        if np.any(asked[..., part]):
            made[name] = each[..., part].sum(-1)
    return made


MME = Task(
    "MME", "lmms-lab/MME", columns, official, asks=YES_NO, score=score, whole=Whole(parts, values), splits=("test",),
    complete=True,
)  # fmt: skip
