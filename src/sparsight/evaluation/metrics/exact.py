"""Exact match: the prediction is one of the answers, up to case and white space, or up to punctuation as well."""

from __future__ import annotations

import string
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction equals an answer up to case and white space, else 0."""
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def plain_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction equals an answer up to case and punctuation, else 0: lmms-eval's score of GQA."""
    text = prediction.lower().translate(_NO_PUNCTUATION)
    return float(any(answer.lower().translate(_NO_PUNCTUATION) == text for answer in answers))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
