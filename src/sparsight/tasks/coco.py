"""COCO captions: five captions of every picture, scored with CIDEr-D.

Chen et al., "Microsoft COCO Captions", arXiv 1504.00325; https://cocodataset.org. Papers score the 5,000 pictures of
Karpathy's test split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from sparsight.errors import SparsightError
from sparsight.tasks.nocaps import caption_rows
from sparsight.tasks.release import Release, canonical, read_annotations
from sparsight.tasks.task import Row, Task, images_of
from sparsight.tasks.wording import CAPTION


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """Karpathy's split (`dataset_coco.json`, or LAVIS's `coco_karpathy_test.json`), or `captions_val2014.json`."""
    if found := karpathy(release, "coco", split):
        return found
    part = canonical(split or "validation")
    name = "val" if part == "validation" else part
    return part, caption_rows(release.json(f"captions_{name}2014.json", f"captions_{name}2017.json"))


def karpathy(release: Release, name: str, split: str | None) -> tuple[str, list[Row]] | None:
    """Captions in the form of Karpathy's files or of LAVIS's; None where neither is there.

    **Raises** `SparsightError` for a split that is not in them.
    """
    part = canonical(split or "test")
    names = [part, "val"] if part == "validation" else [part]
    if files := release.find(f"dataset_{name}.json"):
        images = [image for image in read_annotations(files[0])["images"] if image["split"] in names]
        if not images:
            raise SparsightError(f"{files[0]}: no split {split!r}; it has 'test', 'val' and 'train'")
        rows = []
        for image in images:
            path = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
            captions = [sentence["raw"] for sentence in image["sentences"]]
            rows.append({"id": image["filename"], "images": [(path, image["filename"])], "answers": captions})
        return part, rows
    patterns = [f"{name}_karpathy_{each}.json" for each in names] + [f"{name}_{each}.json" for each in names]
    if files := release.find(*patterns):
        return part, [
            {
                "id": PurePosixPath(row["image"]).name, "images": [(row["image"], PurePosixPath(row["image"]).name)],
                "answers": row["caption"] if isinstance(row["caption"], list) else [row["caption"]],
            }
            for row in read_annotations(files[0])
        ]  # fmt: skip
    return None


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/COCO-Caption."""
    return {"id": row.get("question_id") or row["id"], "images": images_of(row["image"]), "answers": row["answer"]}


COCO = Task(
    "COCO captions", "lmms-lab/COCO-Caption", columns, official, asks=CAPTION, metrics=("cider_d",),
    splits=("validation", "test"),
)  # fmt: skip
