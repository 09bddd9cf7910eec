"""Relaxed accuracy: what ChartQA scores answers by.

A number may be off by 5 % of the right one, and any other answer must be equal but for case (Masry et al., "ChartQA",
Findings of ACL 2022, section 5.1). As in the evaluations that are in use, Pix2Struct's and Qwen-VL's, `12%` is the number
0.12 and a right answer of 0 is compared as text.
"""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction is near one of the answers, else 0."""
    return float(any(_near(prediction, answer) for answer in answers))


def _near(prediction: str, answer: str) -> bool:
    value, right = _number(prediction), _number(answer)
    if value is None or not right:
        return prediction.lower() == answer.lower()
    return abs(value - right) / abs(right) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
