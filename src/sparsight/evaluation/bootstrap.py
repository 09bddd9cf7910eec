"""Intervals by the bootstrap's percentiles (Efron, 1979): of a mean over samples, and of scores of all samples together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsight.errors import SparsightError

DRAWS = 2**18  # values that are drawn at once


def bootstrap(values: Sequence[float], n: int = 2000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Return the interval that holds the means of a share `level` of `n` resamples, drawn with replacement from `values`.

    **Raises** `SparsightError` without values, for a level outside (0, 1), and for n below 1.
    """
    if len(values) == 0:
        raise SparsightError("an interval needs at least one value")
    if not 0 < level < 1 or n < 1:
        raise SparsightError(f"an interval needs a level between 0 and 1 and n of at least 1, got {level} and {n}")
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWS // len(array))
    means = [
        array[generator.integers(0, len(array), (min(at_once, n - done), len(array)))].mean(axis=1)
        for done in range(0, n, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_sums(
    parts: Sequence[Sequence[float]],
    values: Callable[[Any], Mapping[str, Any]],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float, float]]:
    """Return the scores by name that `values` makes of the sums of `parts` (units, numbers), each with its interval.

    Units are drawn with replacement. `values` takes an array (..., numbers) and gives an array (...) per name.
    """
    array = np.asarray(parts, dtype=np.float64)
    generator = np.random.default_rng(seed)
    sums = []
    for _ in range(n):
        counts = np.bincount(generator.integers(0, len(array), len(array)), minlength=len(array))
        sums.append(counts @ array)
    exact, drawn = values(array.sum(0)), values(np.stack(sums))
    made = {}
    for name, value in exact.items():
        low, high = np.quantile(drawn[name], [(1 - level) / 2, (1 + level) / 2])
        made[name] = (float(value), float(low), float(high))
    return made
