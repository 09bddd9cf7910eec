"""CIDEr-D: the agreement of a caption with people's captions, weighted towards words that are rare among images.

With g(c) the vector of term frequency times log(images / images whose references hold the n-gram), over the n-grams of
one length in caption c, and |c| the caption's number of bigrams:

    CIDEr-D_n = 10 / m * sum_j exp(-(|c| - |r_j|)^2 / (2 * 6^2)) * min(g(c), g(r_j)) . g(r_j) / (|g(c)| |g(r_j)|)

averaged over n = 1..4 (Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", 2015). The reference
code, `cider_scorer.py` of https://github.com/tylin/coco-caption, takes captions already tokenised, by a Java program;
here words are lower-cased and stripped of punctuation, and a hyphen, an apostrophe or a point inside a word stays.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

SIGMA = 6.0
LENGTHS = 4
_WORD = re.compile(r"\w+(?:[-'’.]\w+)*")

Gram = tuple[str, ...]
Vector = tuple[list[dict[Gram, float]], list[float], int]  # weights and norm by n-gram length, number of bigrams


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Score each prediction against its own references; the score of a data set is the mean.

    Scores are 0 to 10. The rarity of an n-gram is counted over all references, so the score of one caption depends on
    the others, and with a single image every score is 0.
    """
    counted = [[_count(words(caption)) for caption in captions] for captions in references]
    images = Counter(gram for captions in counted for gram in set().union(*captions))
    total = math.log(max(len(counted), 1))
    scores = []
    for prediction, captions in zip(predictions, counted, strict=True):
        vector = _weigh(_count(words(prediction)), images, total)
        likeness = [_likeness(vector, _weigh(caption, images, total)) for caption in captions]
        scores.append(10 * sum(likeness) / len(likeness))
    return scores


def words(caption: str) -> list[str]:
    """Split a caption into lower-case words without punctuation."""
    return _WORD.findall(caption.lower())


def _count(caption: list[str]) -> Counter[Gram]:
    return Counter(tuple(caption[i : i + n]) for n in range(1, LENGTHS + 1) for i in range(len(caption) - n + 1))


def _weigh(counts: Counter[Gram], images: Counter[Gram], total: float) -> Vector:
    weights: list[dict[Gram, float]] = [{} for _ in range(LENGTHS)]
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * (total - math.log(max(images[gram], 1)))
    norms = [math.sqrt(sum(weight**2 for weight in each.values())) for each in weights]
    return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)


def _likeness(ours: Vector, theirs: Vector) -> float:
    """Clipped cosine, averaged over the n-gram lengths, damped by the difference in length."""
    total = 0.0
    for mine, other, norm, norm_other in zip(ours[0], theirs[0], ours[1], theirs[1], strict=True):
        if norm and norm_other:
            common = sum(min(weight, other[gram]) * other[gram] for gram, weight in mine.items() if gram in other)
            total += common / (norm * norm_other)
    return math.exp(-((ours[2] - theirs[2]) ** 2) / (2 * SIGMA**2)) * total / LENGTHS
