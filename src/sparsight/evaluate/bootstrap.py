"""How far a mean would move with other samples: the bootstrap's percentile interval (Efron, 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsight.errors import SparsightError


def bootstrap(values: Sequence[float], n: int = 2000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Give the interval that holds the mean of `level` of `n` resamples, drawn with replacement from `values`."""
    if len(values) == 0:
        raise SparsightError("an interval needs at least one value")
    if not 0 < level < 1 or n < 1:
        raise SparsightError(f"an interval needs a level between 0 and 1 and n of at least 1, got {level} and {n}")
    given = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [given[generator.integers(0, len(given), len(given))].mean() for _ in range(n)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
