"""Questions and captions about photos in class folders, from the names of the classes alone.

Every photo has one record in its file: what it shows, whether one thing is there, which of three things it is, its group,
or a caption. The groups are asked for where every class is in one of them. Wordings, other classes and the order of photos
come from a seed. The records are in the form that `sparsight` reads: image, prompt, answer, kind, id.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
GROUPS = {
    "animal": (
        "bear", "bee", "bird", "butterfly", "camel", "cat", "chicken", "cow", "deer", "dog", "elephant", "fish", "fox",
        "frog", "giraffe", "goat", "horse", "lion", "monkey", "mouse", "pig", "rabbit", "sheep", "snake", "spider",
        "tiger", "wolf",
    ),
    "vehicle": (
        "airplane", "automobile", "bicycle", "boat", "bus", "car", "motorcycle", "plane", "ship", "tractor", "train",
        "truck",
    ),
}  # fmt: skip
NAME = (
    "What is in the photo?", "What does the picture show?", "Name the thing in the image.", "What can be seen here?",
    "Which object is this?", "What is this?",
)  # fmt: skip
THERE = ("Is there {} in the photo?", "Does the picture show {}?", "Can {} be seen here?", "Is this {}?")
CHOICE = ("Which of these is it: {}, {} or {}?", "Is this {}, {} or {}?", "Choose one: {}, {}, {}.")
GROUP = ("Is this an animal or a vehicle?", "Animal or vehicle?", "What kind of thing is it, an animal or a vehicle?")
CAPTION = ("Describe the photo.", "Write a caption for the image.", "Caption the picture.")
KINDS = ("name", "yes/no", "choice", "group", "caption")


def class_folders(photos: Path, split: str) -> dict[str, list[Path]]:
    """The photos of every class: those of `photos/train` or `photos/test`; else every sixth photo of a class is for test."""
    root = photos / split if (photos / "test").is_dir() else photos
    classes = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if root == photos:
            files = [path for i, path in enumerate(files) if (i % 6 == 5) == (split == "test")]
        if files:
            classes[folder.name.replace("_", " ")] = files
    if len(classes) < 3:
        raise SystemExit(f"{root}: needs at least three folders of photos, one for each class")
    return classes


def article(name: str) -> str:
    """The name with its article."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def ask(name: str, classes: Sequence[str], kind: str, draw: random.Random) -> tuple[str, str]:
    """One prompt of a kind about a photo of a class, and its answer."""
    others = [other for other in classes if other != name]
    if kind == "name":
        return draw.choice(NAME), name
    if kind == "caption":
        return draw.choice(CAPTION), f"a photo of {article(name)}"
    if kind == "group":
        return draw.choice(GROUP), next(group for group, names in GROUPS.items() if name in names)
    if kind == "choice":
        three = draw.sample([name, *draw.sample(others, 2)], 3)
        return draw.choice(CHOICE).format(*three), name
    yes = draw.random() < 0.5
    return draw.choice(THERE).format(article(name if yes else draw.choice(others))), "yes" if yes else "no"


def kinds_of(classes: Sequence[str]) -> tuple[str, ...]:
    """The kinds of questions that the classes allow."""
    grouped = {name for names in GROUPS.values() for name in names}
    return KINDS if set(classes) <= grouped else tuple(kind for kind in KINDS if kind != "group")


def write_questions(photos: dict[str, list[Path]], file: Path, seed: int) -> list[dict[str, Any]]:
    """Write one record a photo, in mixed order, and a copy of every photo beside the file; return the records."""
    draw = random.Random(seed)
    classes = list(photos)
    kinds = kinds_of(classes)
    records = []
    for name, files in photos.items():
        folder = file.parent / file.stem / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(files):
            copy = folder / path.name
            shutil.copyfile(path, copy)
            kind = kinds[number % len(kinds)]
            prompt, answer = ask(name, classes, kind, draw)
            image = copy.relative_to(file.parent).as_posix()
            records.append({"image": image, "prompt": prompt, "answer": answer, "kind": kind})
    draw.shuffle(records)
    records = [{"id": f"{file.stem}-{number}", **record} for number, record in enumerate(records)]
    write_jsonl(records, file)
    return records


def text_records(texts: Sequence[str], words: int = 12, most: int = 80) -> list[dict[str, str]]:
    """Records without an image: the first words of a passage ask, those after them answer."""
    rows = [text.split() for text in texts]
    return [
        {"id": f"text-{i}", "prompt": " ".join(row[:words]), "answer": " ".join(row[words : words + most]), "kind": "text"}
        for i, row in enumerate(rows)
    ]


def write_jsonl(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Write records, one a line."""
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
