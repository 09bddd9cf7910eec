"""Exact match: the prediction is one of the answers, up to case and white space."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction equals an answer up to case and white space, else 0."""
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
