"""Methods: weights and moments and a pattern in, pruned weights out; pure, with no model in sight.

One file per method, and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sparsight.errors import SparsightError
from sparsight.plan.budget import nearest
from sparsight.prune.methods.magnitude import magnitude
from sparsight.prune.methods.random import random
from sparsight.prune.methods.wanda import wanda


@dataclass(frozen=True)
class Method:
    """`prune(W, moments, pattern, generator) -> W'`; `needs` is what must be known of the inputs; `mask_only` promises
    that kept weights stay as they were."""

    prune: Callable
    needs: Literal["norm"] | None
    mask_only: bool = True


METHODS: dict[str, Method] = {
    "random": Method(random, needs=None),
    "magnitude": Method(magnitude, needs=None),
    "wanda": Method(wanda, needs="norm"),
}


def find_method(method: str | Method | Callable) -> Method:
    """Look a method up by name; a function with a method's signature works wherever a name does."""
    if isinstance(method, Method):
        return method
    if callable(method):
        return Method(method, needs="norm", mask_only=False)
    if method not in METHODS:
        raise SparsightError(f"--method: unknown method {method!r}; {nearest(method, tuple(METHODS))}")
    return METHODS[method]
