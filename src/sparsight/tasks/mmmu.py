"""MMMU: questions of college courses in 30 subjects, with options or open, about one or several pictures.

Yue et al., "MMMU", CVPR 2024; https://github.com/MMMU-Benchmark/MMMU. Answers are read as in its `eval_utils.py`, with one
difference: where no option is found it guesses at random, and here the answer is wrong.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparsight.data.sample import Sample
from sparsight.tasks.task import LETTERS, Row, Task, choice, images_of, letter_columns
from sparsight.tasks.wording import LETTER

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (  # with commas, with an exponent, plain
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def columns(row: Mapping[str, Any]) -> Row:
    """A row of MMMU/MMMU or lmms-lab/MMMU. The pictures that the texts name as `<image 1>` stand before the question."""
    options = _list(row["options"]) if row.get("options") else letter_columns(row)
    names = sorted({f"image_{n}" for n in re.findall(r"<image (\d+)>", " ".join([row["question"], *map(str, options)]))})
    images = [row[name] for name in names if row.get(name) is not None]
    if not images:
        images = images_of(row["image_1"] if row.get("image_1") is not None else row.get("image"))
    answers = choice(options, row["answer"]) if options else {"answers": [str(x) for x in _list(row["answer"])]}
    name = str(row["id"] if row.get("id") is not None else row["index"])
    subject = re.sub(r"^[^_]+_|_\d+$", "", name) if "_" in name else str(row.get("category", ""))
    return {"id": name, "question": row["question"], "images": images, "kind": subject, **answers}


def _list(value: Any) -> list[Any]:
    """The list that a text such as "['a', 'b']" stands for; a list with the text itself for any other."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return list(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            return [value]
    return list(value) if isinstance(value, list) else [value]


def letter(prediction: str, options: Sequence[str]) -> str:
    """The letter of an answer to a question with options, of several the last; "" for none."""
    text = prediction
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    for form in ("({})", " {} "):
        if there := [choice for choice in letters if form.format(choice) in text]:
            return max(there, key=lambda choice: text.rfind(form.format(choice)))
    if len(text.split()) > 5:
        low = text.lower()
        if named := [choice for choice, option in zip(letters, options, strict=True) if option.lower() in low]:
            return max(named, key=lambda choice: low.rfind(options[LETTERS.index(choice)].lower()))
    return ""


def is_open_right(prediction: str, answers: Sequence[str]) -> bool:
    """Whether an answer to an open question holds one of the right texts, or is one of the right numbers."""
    right = [form for answer in answers for form in _forms(answer)]
    pieces = _pieces(prediction)
    pieces += [number for piece in pieces for pattern in _NUMBERS for number in re.findall(pattern, piece)]
    for form in (form for piece in pieces for form in _forms(piece)):
        if isinstance(form, str):
            if any(isinstance(text, str) and text in form for text in right):
                return True
        elif form in right:
            return True
    return False


def _pieces(prediction: str) -> list[str]:
    """The parts of an answer that may hold what was asked: behind words such as "is" and "therefore"."""
    text = prediction.strip().strip(".").lower()
    sentences, found = re.split(r"\.\s(?=[A-Z])|\n", text), []
    for i, sentence in enumerate(sentences):
        keys = (*_KEYS, "=") if i == len(sentences) - 1 else _KEYS
        ends = [sentence.split(key)[-1].strip() for key in keys if key in sentence]
        shortest = ""
        for end in ends:
            shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    return found or [text]


def _forms(text: str) -> list[str | float]:
    """The number that a text is, rounded to two places, or its lower case; a single letter stands beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        low = text.lower()
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]


def score(prediction: str, sample: Sample) -> float:
    """1 for a right answer, to either kind of question."""
    if sample.options:
        return float(letter(prediction, sample.options) == sample.answers[0])
    return float(is_open_right(prediction, sample.answers))


MMMU = Task(
    "MMMU", "lmms-lab/MMMU", columns, asks=LETTER, score=score, splits=("validation", "dev"), max_new_tokens=128
)  # fmt: skip
