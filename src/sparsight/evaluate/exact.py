"""Exact match: the prediction is one of the answers, whatever the case and the spaces."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Give 1 if the prediction equals an answer but for case and white space, else 0."""
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
