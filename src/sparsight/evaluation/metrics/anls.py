"""ANLS, average normalised Levenshtein similarity: what DocVQA, InfographicVQA and ST-VQA score answers by.

    ANLS = mean over samples of max_a s(a, prediction),    s = 1 - NL if NL < 0.5 else 0

with NL the Levenshtein distance of the lower-case texts over the length of the longer (Biten et al., "Scene Text Visual
Question Answering", ICCV 2019; the threshold and the spaces, which are joined, are those of the competition's evaluation).
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str]) -> float:
    """The similarity of a prediction to the nearest answer, in [0, 1]; 0 where half the letters or more differ."""
    text = _plain(prediction)
    return max((_similarity(text, _plain(answer)) for answer in answers), default=0.0)


def levenshtein(a: str, b: str) -> int:
    """The least number of letters to insert, delete or replace that makes `b` of `a`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    distance = levenshtein(a, b) / longest if longest else 0.0
    return 1 - distance if distance < THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())
