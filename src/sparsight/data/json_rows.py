"""The records of `.jsonl` and `.json` files, each with its line; a record that is not JSON is refused when it is read."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from sparsight.data.annotations import records_of
from sparsight.data.images import BadRecord
from sparsight.data.tables import Rows
from sparsight.errors import SparsightError, quote

_SPACE = re.compile(r"\s*")


def jsonl_rows(text: str) -> Rows:
    """The lines of a text that are not empty, one record each."""
    lines = text.removeprefix("\ufeff").split("\n")  # not splitlines(): a string may hold U+2028
    return [(number, partial(_decode_line, line)) for number, line in enumerate(lines, 1) if line.strip()]


def json_rows(text: str, source: Path) -> Rows:
    """The items of a JSON list, each with the line where it starts; the records of an annotation file, numbered.

    **Raises** `SparsightError` for anything else, and for text behind the end.
    """
    text = text.removeprefix("\ufeff")
    decoder, items = json.JSONDecoder(), []
    at = _skip_space(text, 0)
    try:
        if text[at : at + 1] == "{":
            return [(i, partial(_decode, json.dumps(row))) for i, row in enumerate(_annotations(text, at, source), 1)]
        if text[at : at + 1] != "[":
            raise SparsightError(f"{source}: a .json file must hold a list of records; for one record a line use .jsonl")
        at = _skip_space(text, at + 1)
        while text[at : at + 1] != "]":
            _, end = decoder.raw_decode(text, at)
            items.append((at, end))
            at = _skip_space(text, end)
            if text[at : at + 1] == ",":
                at = _skip_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        _check_end(text, at + 1, source, "one list of records")
    except (ValueError, RecursionError) as error:
        line = 1 + text.count("\n", 0, error.pos if isinstance(error, json.JSONDecodeError) else at)
        raise SparsightError(f"{source}:{line}: not JSON: {error}") from error
    rows, line, last = [], 1, 0
    for start, end in items:
        line, last = line + text.count("\n", last, start), start
        rows.append((line, partial(_decode, text[start:end])))
    return rows


def _annotations(text: str, at: int, source: Path) -> list[dict[str, Any]]:
    try:
        content, end = json.JSONDecoder(object_pairs_hook=_once).raw_decode(text, at)
    except BadRecord as error:
        raise SparsightError(f"{source}: {error}") from error
    _check_end(text, end, source, "one list of records, or one object of annotations")
    return records_of(content, source)


def _check_end(text: str, at: int, source: Path, allowed: str) -> None:
    """Refuse text behind the end of the data, which would be left out."""
    at = _skip_space(text, at)
    if at < len(text):
        line = 1 + text.count("\n", 0, at)
        raise SparsightError(f"{source}:{line}: a .json file holds {allowed}; for one record a line use .jsonl")


def _decode_line(line: str) -> Any:
    record = _decode(line, "; a line of a .jsonl file holds one whole object, and a list of them belongs in a .json file")
    if isinstance(record, list):
        raise BadRecord("expected an object, got a list; a list of records belongs in a .json file")
    return record


def _decode(text: str, hint: str = "") -> Any:
    try:
        record = json.loads(text, object_pairs_hook=_once)
        if "\\u" in text:
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRecord("half of a surrogate pair, which is no character") from error
    except BadRecord:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}{hint}") from error
    return record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand there once: of two values under one key, one would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRecord(f"the key {quote(next(key for key in made if keys.count(key) > 1))} stands twice; leave one out")
    return made


def _skip_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
