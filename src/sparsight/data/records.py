"""From one record of a data source to a `Sample`, or to one line about what is wrong with it.

A record has one of three forms (keys in brackets may be missing):

    {"prompt": ..., "answer": ... or "answers": [...], ["image" or "images"], ["id"], ["kind"]}
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...], [same keys]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...], [same keys]}

`content` is a string or a list of parts, `{"type": "text", "text": ...}` and `{"type": "image", "image": path}` (or
`path`, or `url` with a relative path; with no path the part takes the next of the record's `images`). A prompt may say
with `<image>` where an image belongs. `file_name` is another name of `image`, as in the metadata.jsonl of `datasets`.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from sparsight.data.sample import PLACEHOLDER, Sample, Turn, upright

Find = Callable[[Any], tuple[Path | Image.Image, str]]  # an image entry -> the image and the hash of its content

_IMAGES = ("image", "images", "file_name")
_FLAT = ("prompt", "answer", "answers")
_ROLES = {"messages": ("role", "user", "assistant"), "conversations": ("from", "human", "gpt")}
_KEYS = (*_FLAT, *_ROLES, *_IMAGES, "id", "kind")


class BadRecord(ValueError):
    """Why a record cannot be used; the reader adds the file and the line."""


def parse(record: Any, number: int, find: Find) -> tuple[Sample, tuple[str, ...]]:
    """Make the sample of one record, and the content hashes of its images. `number` names a record without an id.

    **Raises** `BadRecord` for anything missing, unknown, empty or of a wrong type, and for images that `find` refuses.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"expected an object, got {_type(record)}")
    _check_keys(record)
    entries = _entries(record)
    if "messages" in record:
        turns, entries = _dialogue(record, "messages", entries)
    elif "conversations" in record:
        turns, entries = _dialogue(record, "conversations", entries)
    else:
        turns = [Turn(_text(record, "prompt"), _answers(record))]
    turns = _place(turns, len(entries))
    images = [find(entry) for entry in entries]
    identity = record.get("id", str(number))
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    if not isinstance(identity, str) or not identity:
        raise BadRecord(f"'id' must be a non-empty string or a whole number, got {_type(identity)}")
    kind = record.get("kind", "")
    if not isinstance(kind, str):
        raise BadRecord(f"'kind' must be a string, got {_type(kind)}")
    sample = Sample(identity, tuple(image for image, _ in images), tuple(turns), kind)
    return sample, tuple(digest for _, digest in images)


def finder(folder: Path) -> Find:
    """Return a function that opens images by their path relative to `folder`; it reads nothing outside the folder.

    It raises `BadRecord` for absolute paths, `..`, addresses, links that lead out, and what Pillow cannot decode whole.
    """
    root = folder.resolve()
    decoded: set[str] = set()  # hashes of whole images

    def find(entry: Any) -> tuple[Path, str]:
        if not isinstance(entry, str) or not entry or "\0" in entry:
            raise BadRecord(f"an image must be a relative path, got {_type(entry)}")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", entry):
            raise BadRecord(f"image {entry!r} is an address; only files beside the data are read")
        if PurePosixPath(entry).is_absolute() or PureWindowsPath(entry).is_absolute():
            raise BadRecord(f"image path {entry!r} is absolute; give it relative to the data file")
        path = folder / entry
        try:
            if ".." in PurePosixPath(entry).parts or not path.resolve().is_relative_to(root):
                raise BadRecord(f"image path {entry!r} leaves the folder of the data file")
            if not path.is_file():
                raise BadRecord(f"image {entry!r} does not exist")
            content = path.read_bytes()
        except (OSError, RuntimeError) as error:  # a loop of links, a name too long, no permission
            raise BadRecord(f"image {entry!r} cannot be read: {_first_line(error)}") from error
        digest = hashlib.sha256(content).hexdigest()
        if digest in decoded:  # several questions about one image
            return path, digest
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.verify()
            with Image.open(io.BytesIO(content)) as image:  # verify() passes a file that was cut short, and spoils `image`
                upright(image)
        except UnidentifiedImageError as error:
            raise BadRecord(f"image {entry!r} cannot be read: not an image that Pillow knows") from error
        except Exception as error:  # Pillow raises nearly everything on a broken file
            raise BadRecord(f"image {entry!r} cannot be read: {_first_line(error)}") from error
        decoded.add(digest)
        return path, digest

    return find


def in_memory(entry: Any) -> tuple[Image.Image, str]:
    """Return an image that a dataset has already decoded, and the hash of its pixels; **raises** `BadRecord` for others."""
    if not isinstance(entry, Image.Image):
        raise BadRecord(f"the image column must hold images, got {_type(entry)}")
    try:
        content = entry.tobytes()
        upright(entry)
    except Exception as error:  # it may be decoded only now
        raise BadRecord(f"the image cannot be read: {_first_line(error)}") from error
    digest = hashlib.sha256(f"{entry.mode} {entry.size} ".encode())
    digest.update(content)
    return entry, digest.hexdigest()


def _check_keys(record: dict[str, Any]) -> None:
    forms = [key for key in ("messages", "conversations", "prompt") if key in record]
    if len(forms) > 1:
        raise BadRecord(f"{forms[0]!r} and {forms[1]!r} cannot stand together")
    extra = ("model",) if "conversations" in record else ()  # LLaVA's files name the model that wrote the text
    allowed = [key for key in (*_KEYS, *extra) if forms[:1] != ["messages"] or key not in _FLAT]
    for key in record:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, 1)
            hint = f"did you mean {close[0]!r}?" if close else "known keys: " + ", ".join(allowed)
            raise BadRecord(f"unknown key {key!r}; {hint}")
    if forms and forms[0] != "prompt" and (clash := [key for key in ("answer", "answers") if key in record]):
        raise BadRecord(f"{forms[0]!r} and {clash[0]!r} cannot stand together")
    if not forms:
        raise BadRecord("missing 'prompt' (or 'messages', or 'conversations')")


def _entries(record: dict[str, Any]) -> list[Any]:
    keys = [key for key in _IMAGES if record.get(key) is not None]
    if len(keys) > 1:
        raise BadRecord(f"{keys[0]!r} and {keys[1]!r} cannot stand together")
    if not keys:
        return []
    value = record[keys[0]]
    if keys[0] == "images" and not isinstance(value, list):
        raise BadRecord(f"'images' must be a list, got {_type(value)}")
    return list(value) if isinstance(value, list) else [value]


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    keys = [key for key in ("answer", "answers") if key in record]
    if len(keys) != 1:
        raise BadRecord("'answer' and 'answers' cannot stand together" if keys else "missing 'answer' (or 'answers')")
    values = record[keys[0]]
    if keys[0] == "answer":
        values = [values]
    if not isinstance(values, list) or not values:
        raise BadRecord(f"'answers' must be a non-empty list of strings, got {_type(values)}")
    # people's answers as the VQA files write them: {"answer": "red", "answer_confidence": "yes", "answer_id": 1}
    values = [value.get("answer") if isinstance(value, dict) else value for value in values]
    return tuple(_answer(value) for value in values)


def _answer(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"an answer must be a string, got {_type(value)}")
    if not value.strip():
        raise BadRecord("empty answer")
    if PLACEHOLDER in value:
        raise BadRecord(f"an answer cannot hold {PLACEHOLDER}")
    return value.strip()


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise BadRecord(f"missing {key!r}")
    if not isinstance(record[key], str):
        raise BadRecord(f"{key!r} must be a string, got {_type(record[key])}")
    return record[key]


def _dialogue(record: dict[str, Any], form: str, entries: list[Any]) -> tuple[list[Turn], list[Any]]:
    """Read alternating questions and answers; image parts with a path of their own add to the images."""
    who, asks, answers = _ROLES[form]
    messages = record[form]
    if not isinstance(messages, list) or not messages:
        raise BadRecord(f"{form!r} must be a non-empty list, got {_type(messages)}")
    texts: list[str] = []
    paths: list[Any] = []  # of image parts; None for one without a path
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRecord(f"{form}[{i}] must be an object, got {_type(message)}")
        expected = answers if i % 2 else asks
        if message.get(who) != expected:
            raise BadRecord(f"{form}[{i}]: {who!r} must be {expected!r}, got {message.get(who)!r}")
        content = message.get("content" if form == "messages" else "value")
        texts.append(_content(content, f"{form}[{i}]", paths if form == "messages" else None))
    if len(texts) % 2:
        raise BadRecord(f"{form!r} must end with an answer of {answers!r}")
    own = [path for path in paths if path is not None]
    if own and entries:
        raise BadRecord("give image paths either in 'images' or in the messages, not in both")
    turns = [Turn(texts[i], (_answer(texts[i + 1]),)) for i in range(0, len(texts), 2)]
    return turns, own or entries


def _content(content: Any, where: str, paths: list[Any] | None) -> str:
    """Return the text of one message, and add the paths of its images to `paths`, in place; None allows no parts."""
    if isinstance(content, str):
        return content
    if paths is None or not isinstance(content, list):
        allowed = "a string" if paths is None else "a string or a list of parts"
        raise BadRecord(f"{where}: the text must be {allowed}, got {_type(content)}")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind == "image":
            paths.append(next((part[key] for key in ("image", "path", "url") if key in part), None))
            pieces.append(PLACEHOLDER)
        else:
            raise BadRecord(f"{where}: a part must be a text or an image, got {part!r}"[:200])
    return "".join(pieces)


def _place(turns: list[Turn], images: int) -> list[Turn]:
    """Check the placeholders against the images, and drop them where all stand first, which is the default."""
    count = sum(turn.prompt.count(PLACEHOLDER) for turn in turns)
    if count not in (0, images):
        raise BadRecord(f"{count} {PLACEHOLDER} in the prompts but {images} image{'' if images == 1 else 's'}")
    lead = re.match(rf"(\s*{PLACEHOLDER}){{{count}}}\s*", turns[0].prompt) if count else None
    first = turns[0].prompt[lead.end() :] if lead else turns[0].prompt
    turns = [Turn(first.strip(), turns[0].answers), *(Turn(turn.prompt.strip(), turn.answers) for turn in turns[1:])]
    if any(not turn.prompt.replace(PLACEHOLDER, "").strip() for turn in turns):
        raise BadRecord("empty prompt")
    return turns


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    if value in ([], ""):
        return f"an empty {'list' if value == [] else 'string'}"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
