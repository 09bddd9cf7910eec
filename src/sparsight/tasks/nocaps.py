"""NoCaps: ten captions each of pictures with objects that COCO's captions do not name.

Agrawal et al., "nocaps", ICCV 2019; https://nocaps.org. Scored with CIDEr-D; kinds are the domains of the pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsight.tasks.release import Release
from sparsight.tasks.task import Row, Task, images_of
from sparsight.tasks.wording import CAPTION


def official(release: Release, split: str | None) -> tuple[str, Iterable[Row]]:
    """`nocaps_val_4500_captions.json`, with the pictures of Open Images that it names."""
    release.split(split, ("validation",))
    content = release.json("nocaps_val_4500_captions.json")
    return "validation", caption_rows(content)


def caption_rows(content: Mapping[str, Any]) -> list[Row]:
    """A row for every picture of a file in COCO's form, with all its captions."""
    captions: dict[Any, list[str]] = {}
    for row in content["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return [
        {
            "id": image["id"], "images": [(image["file_name"],)], "answers": captions.get(image["id"], []),
            "kind": image.get("domain", ""),
        }
        for image in content["images"]
    ]  # fmt: skip


def columns(row: Mapping[str, Any]) -> Row:
    """A row of lmms-lab/NoCaps."""
    return {
        "id": row["image_id"], "images": images_of(row["image"]), "answers": row["annotations_captions"],
        "kind": row.get("image_domain", ""),
    }  # fmt: skip


NOCAPS = Task("NoCaps", "lmms-lab/NoCaps", columns, official, asks=CAPTION, metrics=("cider_d",))
