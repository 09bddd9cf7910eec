"""Methods: weights and moments and a pattern in, pruned weights out; pure, with no model in sight.

They compose: a method makes zeros, a refinement moves them, an update changes the kept weights. One file per entry, and
one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsight.checks import check_name, check_signature, nearest
from sparsight.cost import Cost
from sparsight.errors import SparsightError
from sparsight.pruning.methods.alps import alps
from sparsight.pruning.methods.dsnot import dsnot
from sparsight.pruning.methods.gradient import fisher, snip
from sparsight.pruning.methods.magnitude import magnitude
from sparsight.pruning.methods.pcg import pcg
from sparsight.pruning.methods.random import random
from sparsight.pruning.methods.ria import ria
from sparsight.pruning.methods.sparsegpt import sparsegpt
from sparsight.pruning.methods.swaps import swaps
from sparsight.pruning.methods.wanda import wanda

NEEDS = ("norm", "gram", "gradient")
GRAM = frozenset({"gram"})


@dataclass(frozen=True)
class Method:
    """`prune(W, moments, pattern, generator) -> W'`.

    `needs` names the measurements: "norm" (sums and column norms) or "gram" of the inputs, "gradient" of the loss, for which
    batches must have labels; none for methods that use the weights alone. `mask_only`: kept weights do not change. `cost` is
    for the estimate; None: not known.

    **Raises** `SparsightError` for a need that is none of these.
    """

    prune: Callable
    needs: frozenset[str] = frozenset({"norm"})
    mask_only: bool = True
    cost: Cost | None = None

    def __post_init__(self) -> None:
        needs = {self.needs} if isinstance(self.needs, str) else set(self.needs or ())
        if unknown := sorted(needs - set(NEEDS)):
            raise SparsightError(f"a method cannot need {unknown[0]!r}; {nearest(unknown[0], NEEDS)}")
        object.__setattr__(self, "needs", frozenset(needs))

    @property
    def solves(self) -> bool:
        """Whether it fits the kept weights to the layer's outputs."""
        return "gram" in self.needs and not self.mask_only


@dataclass(frozen=True)
class Refine:
    """`refine(W, keep, moments, pattern) -> keep`: another mask with the same counts.

    `attention_only`: the masks of other layers stay as they are. `seconds(out, in)`: the time of one core for a layer whose
    pattern has no groups, where that may be hours; for a warning.
    """

    refine: Callable
    needs: frozenset[str] = GRAM
    attention_only: bool = False
    seconds: Callable[[int, int], float] | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Update:
    """`update(W, keep, moments) -> W'`: other values for the kept weights."""

    update: Callable
    needs: frozenset[str] = GRAM
    cost: Cost | None = None


_SPARSEGPT = Cost(
    lambda out, n: out * n * n, lambda out, n: 8 * n * n, factor=True
)  # scratch: a copy and L, beside the factor
_SWAPS = Cost(lambda out, n: 2 * out * n * n, lambda out, n: 13 * out * n + 4 * n * n)  # the exchanges are no products
_PCG = Cost(lambda out, n: 64 * 2 * out * n * n, lambda out, n: 33 * out * n + 4 * n * n)  # 64 iterations, the demo's mean


def _seconds_of_swaps(out: int, columns: int) -> float:
    """Measured with the compiled kernel: 92 ms per row of 2,048 columns, 350 ms per row of 4,096."""
    return 2.1e-8 * out * columns**2


METHODS: dict[str, Method] = {
    "random": Method(random, needs=frozenset(), cost=Cost()),
    "magnitude": Method(magnitude, needs=frozenset(), cost=Cost()),
    "wanda": Method(wanda, cost=Cost()),
    "ria": Method(ria, cost=Cost()),
    "snip": Method(snip, needs=frozenset({"gradient"})),
    "fisher": Method(fisher, needs=frozenset({"gradient"})),
    "sparsegpt": Method(sparsegpt, needs=GRAM, mask_only=False, cost=_SPARSEGPT),
    "alps": Method(alps, needs=GRAM, mask_only=False),
}
REFINES: dict[str, Refine] = {
    "dsnot": Refine(dsnot, needs=frozenset({"norm"}), attention_only=True, cost=Cost()),
    "dsnot-all": Refine(dsnot, needs=frozenset({"norm"}), cost=Cost()),
    "swaps": Refine(swaps, seconds=_seconds_of_swaps, cost=_SWAPS),
}
UPDATES: dict[str, Update] = {"pcg": Update(pcg, cost=_PCG)}
PRESETS: dict[str, dict[str, str]] = {  # papers that are a composition
    "dsnot": {"method": "wanda", "refine": "dsnot"},
    "sparseswaps": {"method": "wanda", "refine": "swaps"},
    "ecoflap": {"method": "wanda", "policy": "ecoflap"},
    "owl": {"method": "wanda", "policy": "owl"},
}


def find_method(method: str | Method | Callable) -> Method:
    """Look a method up by name; a function with a method's signature works wherever a name does, and may change weights.

    **Raises** `SparsightError` for an unknown name and a function of another signature.
    """
    return _find("method", method, METHODS, Method, lambda f: Method(f, mask_only=False))


def find_refine(refine: str | Refine | Callable | None) -> Refine | None:
    """Look a refinement up by name, as `find_method` does."""
    return None if refine is None else _find("refine", refine, REFINES, Refine, Refine)


def find_update(update: str | Update | Callable | None) -> Update | None:
    """Look an update up by name, as `find_method` does."""
    return None if update is None else _find("update", update, UPDATES, Update, Update)


_ARGUMENTS = {
    "method": "(W, moments, pattern, *, generator)",
    "refine": "(W, keep, moments, pattern)",
    "update": "(W, keep, moments)",
}


def _find(field: str, entry: Any, table: dict[str, Any], kind: type, wrap: Callable) -> Any:
    if isinstance(entry, kind):
        return entry
    if callable(entry) and not isinstance(entry, type):
        check_signature(field, entry, _ARGUMENTS[field])
        return wrap(entry)
    check_name(field, entry, tuple(table))
    return table[entry]
