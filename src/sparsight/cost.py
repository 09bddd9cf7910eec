"""What a table's entry costs, so that the estimate can add it up before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nothing(out: int, columns: int) -> int:
    return 0


@dataclass(frozen=True)
class Cost:
    """The cost of one step for a layer (out, in), beside the moments of its inputs; called with `(out, in)`.

    `flops` counts products and solves, two per multiplication and addition; `scratch` the bytes of a solver's own matrices.
    `factor`: the step uses the Cholesky factor of the inverse Gram matrix, which layers with the same input share.
    """

    flops: Callable[[int, int], int] = _nothing
    scratch: Callable[[int, int], int] = _nothing
    factor: bool = False
