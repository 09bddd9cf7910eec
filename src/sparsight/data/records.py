"""From one record of a data source to a `Sample`, or to one line about what is wrong with it.

A record has one of three forms (keys in brackets may be missing):

    {"prompt": ..., "answer": ... or "answers": [...], ["image" or "images"], ["id"], ["kind"], ["system"]}
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...], [same keys]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...], [same keys]}

`question` is another name of `prompt`, and `file_name` of `image`, as in the metadata.jsonl of `datasets`. A dialogue may
begin with turns of the role `system`. Either dialogue may use the other's names of keys and roles.

`content` is a string or a list of parts: `{"type": "text", "text": ...}`, and `{"type": "image", "image": ...}` (or `path`,
`url`, `base64`, `image_url`; without any, the part takes the next of the record's `images`). An image is a path, a data
URI, base64, or `{"bytes": ..., "path": ...}`. A prompt may say with `<image>` where an image belongs.

Other keys are ignored and counted, unless they look like a misspelt one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sparsight.data.images import BadRecord, Find, kind_of
from sparsight.data.sample import PLACEHOLDER, Sample, Turn
from sparsight.errors import quote

_IMAGES = ("image", "images", "file_name")
_FLAT = ("prompt", "question", "answer", "answers")
_FORMS = {"messages": ("role", "user", "assistant"), "conversations": ("from", "human", "gpt")}
_KEYS = (*_FLAT, *_FORMS, *_IMAGES, "id", "kind", "system")
_MEDIA = ("video", "videos", "audio", "audios")  # what no sample holds
# other people's names of an image; a record without one would become a question about nothing
_OTHER_IMAGES = (
    "image_id", "imageId", "image_1", "imgname", "image_file",
    "image_name", "image_path", "image_paths", "image_url", "image_urls", "img", "imgs",
    "img_path", "img_paths", "picture",
)  # fmt: skip
# options of a question, without which its answer means nothing
_OPTIONS = ("options", "choices", "choice_a", "choice_A", "A")
_PARTS = (
    "type",
    "text",
    "detail",
    "cache_control",
    "annotations",
)  # keys of a part beside its image; the others are counted
_SILENT = ("model",)  # LLaVA's files name the model that wrote the text
_ASKS = ("user", "human")
_ANSWERS = ("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard")
_SYSTEM = ("system", "developer")
_TURN = ("role", "content", "from", "value")  # keys of a message
_SOURCES = ("image", "path", "url", "base64", "image_url", "source")  # keys of an image part


@dataclass(frozen=True)
class Parsed:
    """A sample, the content hashes of its images, the keys that were ignored, and the number of empty answers."""

    sample: Sample
    images: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    empty: int = 0


def parse(record: Any, number: int, find: Find) -> Parsed:
    """Make the sample of one record. `number` names a record without an id.

    **Raises** `BadRecord` for anything missing, misspelt, empty or of a wrong type, and for images that `find` refuses.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"expected an object, got {kind_of(record)}")
    ignored, empty = _check_keys(record), 0
    entries = _entries(record)
    system = _system(record)
    form = next((form for form in _FORMS if form in record), None)
    if form:
        turns, entries, first, more = _dialogue(record, form, entries)
        ignored += more
        if system and first:
            raise BadRecord(f"the key 'system' and a turn of the role 'system' in {form!r} cannot stand together")
        system = system or first
    else:
        answers, empty = _answers(record)
        turns = [Turn(_text(record, "question" if "prompt" not in record else "prompt"), answers)]
    if not entries and (other := next((key for key in ignored if key in _OTHER_IMAGES), None)):
        raise BadRecord(
            f"{other!r} without 'image'; say which file it is, under 'image' or 'images', or name the benchmark with `task`"
        )
    if not form and (other := next((key for key in ignored if key in _OPTIONS), None)):
        raise BadRecord(
            f"{other!r} beside the question would be lost; write them into the prompt, or name the benchmark with `task`"
        )
    if PLACEHOLDER in system:
        raise BadRecord(f"a system text cannot hold {PLACEHOLDER}")
    turns = _place(turns, len(entries))
    images = [find(entry) for entry in entries]
    identity = record.get("id", str(number))
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    if not isinstance(identity, str) or not identity:
        raise BadRecord(f"'id' must be a non-empty string or a whole number, got {kind_of(identity)}")
    kind = record.get("kind", "")
    if not isinstance(kind, str):
        raise BadRecord(f"'kind' must be a string, got {kind_of(kind)}")
    sample = Sample(identity, tuple(image for image, _ in images), tuple(turns), kind, system)
    return Parsed(sample, tuple(digest for _, digest in images), ignored, empty)


def _check_keys(record: dict[str, Any]) -> tuple[str, ...]:
    """Refuse keys that contradict each other or are misspelt; return those that are ignored."""
    forms = [key for key in (*_FORMS, "prompt", "question") if key in record]
    others = [key for key in record if key not in _KEYS]
    if forms[:1] != ["question"] and forms[:1] != ["prompt"] and "question" in forms:
        forms.remove("question")  # beside a dialogue it is one of the other keys
        others.append("question")
    if len(forms) > 1:
        raise BadRecord(f"{forms[0]!r} and {forms[1]!r} cannot stand together")
    for key in others:
        if key not in _KEYS and (near := next((known for known in _KEYS if _is_near(str(key), known)), None)):
            raise BadRecord(f"unknown key {quote(key)}; did you mean {near!r}?")
        if key in _MEDIA and record[key] not in (None, "", []):
            raise BadRecord(f"{key!r}: only images and texts are read; leave the record out")
    if forms and forms[0] in _FORMS and (clash := [key for key in ("answer", "answers") if key in record]):
        raise BadRecord(f"{forms[0]!r} and {clash[0]!r} cannot stand together")
    if not forms:
        raise BadRecord("missing 'prompt' (or 'messages', or 'conversations')")
    return tuple(str(key) for key in others if record[key] is not None and key not in _SILENT)


def _is_near(key: str, known: str) -> bool:
    """Whether a key is a known one but for case, or for one letter too many, too few, wrong or swapped with the next."""
    a, b = key.strip().lower(), known
    if a == b:
        return True
    if len(b) < 4 or abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest, other = a[start:], b[start:]
    return rest[1:] == other or rest == other[1:] or rest[1:] == other[1:] or rest[1::-1] + rest[2:] == other


def _entries(record: dict[str, Any]) -> list[Any]:
    keys = [key for key in _IMAGES if record.get(key) is not None]
    if len(keys) > 1:
        raise BadRecord(f"{keys[0]!r} and {keys[1]!r} cannot stand together")
    if not keys:
        return []
    value = record[keys[0]]
    if keys[0] == "images" and not isinstance(value, list):
        raise BadRecord(f"'images' must be a list, got {kind_of(value)}")
    return list(value) if isinstance(value, list) else [value]


def _system(record: dict[str, Any]) -> str:
    value = record.get("system")
    if value is not None and not isinstance(value, str):
        raise BadRecord(f"'system' must be a string, got {kind_of(value)}")
    return (value or "").strip()


def _answers(record: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """The answers that are not empty, and how many are."""
    keys = [key for key in ("answer", "answers") if key in record]
    if len(keys) != 1:
        raise BadRecord("'answer' and 'answers' cannot stand together" if keys else "missing 'answer' (or 'answers')")
    values = record[keys[0]]
    if keys[0] == "answer":
        return (_answer(values),), 0
    if not isinstance(values, list) or not values:
        raise BadRecord(f"'answers' must be a non-empty list of strings, got {kind_of(values)}")
    # people's answers as the VQA files write them: {"answer": "red", "answer_confidence": "yes", "answer_id": 1}
    values = [value.get("answer") if isinstance(value, dict) else value for value in values]
    full = [value for value in values if not isinstance(value, str) or value.strip()]
    if not full:
        raise BadRecord("empty answer" if len(values) == 1 else f"all {len(values)} answers are empty")
    return tuple(_answer(value) for value in full), len(values) - len(full)


def _answer(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"an answer must be a string, got {kind_of(value)}")
    if not value.strip():
        raise BadRecord("empty answer")
    if PLACEHOLDER in value:
        raise BadRecord(f"an answer cannot hold {PLACEHOLDER}")
    return value.strip()


def _text(record: dict[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise BadRecord(f"{key!r} must be a string, got {kind_of(record[key])}")
    return record[key]


def _dialogue(record: dict[str, Any], form: str, entries: list[Any]) -> tuple[list[Turn], list[Any], str, tuple[str, ...]]:
    """Read alternating questions and answers, and the system text before; image parts with an image of their own add to
    the images. Last come the keys of messages and parts that are ignored."""
    who, asks, answers = _FORMS[form]
    messages = record[form]
    if not isinstance(messages, list) or not messages:
        raise BadRecord(f"{form!r} must be a non-empty list, got {kind_of(messages)}")
    texts: list[str] = []
    system: list[str] = []
    paths: list[Any] = []  # of image parts; None for one without a path
    ignored: dict[str, None] = {}
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRecord(f"{form}[{i}] must be an object, got {kind_of(message)}")
        ignored |= dict.fromkeys(_other_keys(message, form, i))
        role = next((message[key] for key in (who, "role", "from") if message.get(key) is not None), None)
        key = "content" if message.get("content") is not None or (form == "messages" and "value" not in message) else "value"
        if role in _SYSTEM and not texts:
            system.append(_content(message.get(key), f"{form}[{i}]", [], parts=key == "content").strip())
            continue
        if role not in (_ANSWERS if len(texts) % 2 else _ASKS):
            late = "; a system turn must stand first" if role in _SYSTEM else ""
            expected = answers if len(texts) % 2 else asks
            raise BadRecord(f"{form}[{i}]: {who!r} must be {expected!r}, got {quote(role)}{late}")
        texts.append(_content(message.get(key), f"{form}[{i}]", paths, parts=key == "content"))
    if not texts or len(texts) % 2:
        raise BadRecord(f"{form!r} must end with an answer of {answers!r}")
    own = [path for path in paths if path is not None]
    if own and entries:
        raise BadRecord("give image paths either in 'images' or in the messages, not in both")
    turns = [Turn(texts[i], (_answer(texts[i + 1]),)) for i in range(0, len(texts), 2)]
    return turns, own or entries, "\n\n".join(filter(None, system)), tuple(ignored)


def _other_keys(message: dict[str, Any], form: str, i: int) -> list[str]:
    """The keys of a message, and of its parts, that are ignored. **Raises** `BadRecord` for images beside the text."""
    others = [key for key in message if key not in _TURN and message[key] not in (None, "", [])]
    for key in others:
        if key in (*_IMAGES, *_OTHER_IMAGES, *_MEDIA):
            raise BadRecord(f"{form}[{i}]: {key!r} beside the text; put images into the record's 'images', or into parts")
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    known = (*_PARTS, *_SOURCES)
    inner = [key for part in parts for key in part if key not in known and part[key] is not None]
    return [f"{form}.{key}" for key in others] + [f"{form}.content.{key}" for key in inner]


def _content(content: Any, where: str, paths: list[Any], *, parts: bool) -> str:
    """Return the text of one message, and add the images of its parts to `paths`, in place."""
    if isinstance(content, str):
        return content
    if not parts or not isinstance(content, list):
        allowed = "a string or a list of parts" if parts else "a string"
        raise BadRecord(f"{where}: the text must be {allowed}, got {kind_of(content)}")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            pieces.append(part)
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in ("image", "image_url", "input_image"):
            paths.append(_part_image(part))
            pieces.append(PLACEHOLDER)
        else:
            raise BadRecord(f"{where}: a part must be a text or an image, got {quote(part)}")
    return "".join(pieces)


def _part_image(part: dict[str, Any]) -> Any:
    """The image of a part: what stands under its key, or inside the object there; None where the part names none."""
    key = next((key for key in _SOURCES if part.get(key) is not None), None)
    value = None if key is None else part[key]
    if isinstance(value, dict) and key in ("image_url", "source"):
        value = next((value[inner] for inner in ("url", "data") if value.get(inner) is not None), value)
    return {"bytes": value} if key == "base64" else value


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
