"""OK-VQA: questions that need outside knowledge, with ten answers each.

Marino et al., "OK-VQA", CVPR 2019; https://okvqa.allenai.org. Its split `val2014` is the one that papers call its test.
"""

from __future__ import annotations

from collections.abc import Iterable

from sparsight.tasks.release import Release
from sparsight.tasks.task import Row, Task
from sparsight.tasks.vqav2 import columns, read_pairs


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`OpenEnded_mscoco_val2014_questions.json` and its annotations, with the pictures of COCO's `val2014`."""
    return read_pairs(release, split, "")


OKVQA = Task("OK-VQA", "lmms-lab/OK-VQA", columns, official, metrics=("vqa_accuracy",))
