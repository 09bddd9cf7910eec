"""Flickr30k: five captions of every picture, scored with CIDEr-D.

Young et al., "From image descriptions to visual denotations", TACL 2014. Papers score the 1,000 pictures of Karpathy's test
split. Retrieval is another task, for another kind of model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsight.errors import SparsightError
from sparsight.tasks.coco import karpathy
from sparsight.tasks.release import Release, read_annotations
from sparsight.tasks.task import Row, Task, images_of
from sparsight.tasks.wording import CAPTION


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """Karpathy's `dataset_flickr30k.json`, LAVIS's `flickr30k_test.json`, or `results_20130124.token` of all pictures.

    **Raises** `SparsightError` for a split of the last, and for a line in another form.
    """
    if found := karpathy(release, "flickr30k", split):
        return found
    path = release.file("results_20130124.token", "dataset_flickr30k.json")
    if split is not None:
        raise SparsightError(f"{path}: has no splits; put Karpathy's dataset_flickr30k.json beside it, or leave `split` out")
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_annotations(path, str.splitlines), 1):
        name, tab, caption = line.partition("\t")
        if not tab:
            raise SparsightError(f"{path}:{number}: is no line of FILE#NUMBER, a tab and a caption")
        captions.setdefault(name.split("#")[0], []).append(caption)
    return "", [{"id": name, "images": [(name,)], "answers": texts} for name, texts in captions.items()]


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/flickr30k."""
    return {"id": row.get("filename") or row["img_id"], "images": images_of(row["image"]), "answers": row["caption"]}


FLICKR30K = Task(
    "Flickr30k captions", "lmms-lab/flickr30k", columns, official, asks=CAPTION, metrics=("cider_d",), splits=("test",)
)  # fmt: skip
