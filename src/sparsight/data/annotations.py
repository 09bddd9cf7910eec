"""Published annotation files: one JSON object with annotations, whose questions and images may stand elsewhere.

VQA: `{"annotations": [{"question_id", "image_id", "answers"}]}`, with `{"questions": [...]}` in the same file or in a file
beside it. COCO captions: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.
TextVQA, DocVQA: `{"data": [{"question", "answers", "image" or "image_id"}]}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsight.data.images import kind_of
from sparsight.errors import SparsightError, quote

CAPTION_PROMPT = "Describe the image."  # caption files hold no question

Row = dict[str, Any]


def records_of(content: Mapping[str, Any], path: Path) -> list[Row]:
    """The records of an annotation file, one per question, or one per image with all its captions.

    **Raises** `SparsightError` that says which pieces are missing.
    """
    if (data := content.get("data")) is not None:
        return [_with_image(row, {}, content) for row in _rows(data, "data", path)]
    if content.get("annotations") is None:
        if content.get("questions") is not None:
            raise SparsightError(f"{path}: holds questions without answers; give the file with their 'annotations'")
        raise SparsightError(
            f"{path}: a .json file must hold a list of records, or an object with 'annotations' or 'data'; got the keys "
            f"{quote(list(content))}; for one record a line use .jsonl"
        )
    annotations = _rows(content["annotations"], "annotations", path)
    files = _by_key(_rows(content.get("images") or [], "images", path), "id", "file_name", f"{path}: 'images'")
    if any("caption" in row for row in annotations):
        return _captions(annotations, files, content, path)
    if not any("answers" in row or "multiple_choice_answer" in row for row in annotations):
        raise SparsightError(f"{path}: its annotations hold neither 'answers' nor a 'caption'; only these are read")
    questions = _questions(content, path)
    missing = [] if questions else ["the questions (a file with 'questions' beside it)"]
    if any(_file_name(row, files, content) is None for row in annotations):
        missing.append("the images' file names ('images' with 'id' and 'file_name', or a 'data_subtype')")
    if missing:
        raise SparsightError(f"{path}: holds annotations without {' and without '.join(missing)}; put them there")
    rows = []
    for row in annotations:
        _check_id(row, "question_id", path)
        question = questions.get(_key(row.get("question_id")))
        answers = row.get("answers", [row.get("multiple_choice_answer")])
        made = {"image": _file_name(row, files, content), "answers": answers, "id": _name(row.get("question_id"))}
        rows.append(made if question is None else {**made, "prompt": question})
    return rows


def _captions(annotations: list[Row], files: Mapping[Any, Any], content: Mapping[str, Any], path: Path) -> list[Row]:
    by_image: dict[Any, list[Any]] = {}
    for row in annotations:
        _check_id(row, "image_id", path)
        by_image.setdefault(_key(row.get("image_id")), []).append(row)
    if any(_file_name(rows[0], files, content) is None for rows in by_image.values()):
        raise SparsightError(
            f"{path}: holds captions without the images' file names; put 'images' with 'id' and 'file_name' there"
        )
    return [
        {
            "image": _file_name(rows[0], files, content), "prompt": CAPTION_PROMPT, "kind": "caption",
            "answers": [row.get("caption") for row in rows], "id": _name(identity),
        }
        for identity, rows in by_image.items()
    ]  # fmt: skip


def _questions(content: Mapping[str, Any], path: Path) -> dict[Any, Any]:
    """The questions by id: those of the file itself, else of the files beside it whose names say so."""
    if (own := content.get("questions")) is not None:
        return _by_key(_rows(own, "questions", path), "question_id", "question", f"{path}: 'questions'")
    wanted = {_key(row.get("question_id")) for row in content["annotations"]}
    found: dict[Any, Any] = {}
    for other in sorted(path.parent.glob("*.json")):
        if "question" in other.name.lower() and other != path:
            try:
                beside = json.loads(other.read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, RecursionError):
                continue  # it is no file of questions
            if isinstance(beside, dict) and isinstance(beside.get("questions"), list):
                rows = [row for row in beside["questions"] if isinstance(row, dict)]
                rows = [row for row in rows if _key(row.get("question_id")) in wanted]
                found = _by_key(rows, "question_id", "question", str(other), found)
    return found


def _with_image(row: Row, files: Mapping[Any, Any], content: Mapping[str, Any]) -> Row:
    """A record that names its image, if only by number."""
    named = any(row.get(key) is not None for key in ("image", "images", "file_name"))
    if named or row.get("image_id") is None:
        return row
    return {**row, "image": _file_name(row, files, content) or f"{_name(row['image_id'])}.jpg"}


def _file_name(row: Row, files: Mapping[Any, Any], content: Mapping[str, Any]) -> Any:
    """The file of an annotation's image: the one that is listed, or named as COCO names its files; None for neither."""
    image = _key(row.get("image_id"))
    if image in files or row.get("image") is not None:
        return files.get(image, row.get("image"))
    part = content.get("data_subtype")
    return f"COCO_{part}_{image:012d}.jpg" if isinstance(part, str) and isinstance(image, int) else None


def _key(value: Any) -> Any:
    """A number or a text that names a row; None for what names none. `1.0` is 1, as tables write whole numbers."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _by_key(rows: Iterable[Row], key: str, value: str, where: str, known: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
    """`known`, and a value of every row by its key. **Raises** `SparsightError` for two values under one key."""
    made = dict(known or {})
    for row in rows:
        name, new = _key(row.get(key)), row.get(value)
        if name is not None and made.setdefault(name, new) != new:
            raise SparsightError(f"{where}: {key!r} {quote(name)} stands for two: {quote(made[name])} and {quote(new)}")
    return made


def _check_id(row: Row, key: str, path: Path) -> None:
    if _key(row.get(key)) is None:
        raise SparsightError(
            f"{path}: an annotation's {key!r} must be a whole number or a string, got {kind_of(row.get(key))}; it says what "
            "the annotation belongs to"
        )


def _name(value: Any) -> str:
    value = _key(value)
    return "?" if value is None or value == "" else str(value)


def _rows(value: Any, key: str, path: Path) -> list[Row]:
    wrong = next((row for row in value if not isinstance(row, dict)), None) if isinstance(value, list) else value
    if wrong is not None or not isinstance(value, list) or None in value:
        among = " among them" if isinstance(value, list) else ""
        raise SparsightError(f"{path}: {key!r} must be a list of objects, got {kind_of(wrong)}{among}")
    return value
