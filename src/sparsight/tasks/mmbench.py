"""MMBench: questions with up to four options about what a model sees and infers.

Liu et al., "MMBench", ECCV 2024; https://github.com/open-compass/MMBench. The letter of an answer is found as its
evaluation does before it asks another model: the one option that stands there as a word, else the one whose text is there.
Each question is asked once; the options are not rotated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsight.data.sample import Sample
from sparsight.tasks.task import LETTERS, Row, Task, choice, images_of, letter_columns
from sparsight.tasks.wording import LETTER

_FORMS = (
    "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).",
)  # fmt: skip


def columns(row: Mapping[str, Any]) -> Row:
    """A row of `MMBench_DEV_EN.tsv`, or of lmms-lab/MMBench."""
    hint = row.get("hint")
    question = f"{hint}\n{row['question']}" if hint and hint != "nan" else row["question"]
    kind = row.get("l2-category") or row.get("L2-category") or row.get("category")
    return {
        "id": row["index"], "question": question, "images": images_of(row["image"]), "kind": kind,
        **choice(letter_columns(row), row.get("answer")),
    }  # fmt: skip


def letter(prediction: str, options: tuple[str, ...]) -> str:
    """The letter of an answer; "" for none, and for more than one."""
    words = [word.strip() for word in prediction.split()]
    choices = LETTERS[:5]
    alone = [choice for choice in choices if choice in words]
    if len(alone) == 1 and not ("A" in words and len(words) > 3):  # there it may be an article
        return alone[0]
    for form in _FORMS:
        marked = [choice for choice in choices if form.format(choice) in words]
        if len(marked) == 1:
            return marked[0]
    text = prediction.lower()
    named = [LETTERS[i] for i, option in enumerate(options) if option.lower() in text]
    return named[0] if len(named) == 1 else ""


def score(prediction: str, sample: Sample) -> float:
    """1 for the letter, or the text, of the right option."""
    return float(letter(prediction, sample.options) == sample.answers[0])


MMBENCH = Task(
    "MMBench", "lmms-lab/MMBench", columns, asks=LETTER, score=score, splits=("dev", "test"), configurations=("en",)
)  # fmt: skip
