"""Methods: weights and moments and a pattern in, pruned weights out; pure, with no model in sight.

They compose: a method makes zeros, a refinement moves them, an update changes the kept weights. One file per entry, and
one line here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsight.errors import SparsightError
from sparsight.plan.budget import nearest
from sparsight.prune.methods.alps import alps
from sparsight.prune.methods.dsnot import dsnot
from sparsight.prune.methods.gradient import fisher, snip
from sparsight.prune.methods.magnitude import magnitude
from sparsight.prune.methods.pcg import pcg
from sparsight.prune.methods.random import random
from sparsight.prune.methods.ria import ria
from sparsight.prune.methods.sparsegpt import sparsegpt
from sparsight.prune.methods.swaps import swaps
from sparsight.prune.methods.wanda import wanda

NEEDS = ("norm", "gram", "gradient")


@dataclass(frozen=True)
class Method:
    """`prune(W, moments, pattern, generator) -> W'`.

    `needs` says what must be known: of the inputs "norm" (sums and column norms) or "gram", of the loss "gradient";
    nothing for methods that look at the weights alone. `mask_only` promises that kept weights stay as they were.
    """

    prune: Callable
    needs: frozenset[str] = frozenset({"norm"})
    mask_only: bool = True

    def __post_init__(self) -> None:
        given = {self.needs} if isinstance(self.needs, str) else set(self.needs or ())
        if unknown := given - set(NEEDS):
            raise SparsightError(f"a method cannot need {sorted(unknown)[0]!r}; {nearest(sorted(unknown)[0], NEEDS)}")
        object.__setattr__(self, "needs", frozenset(given))


@dataclass(frozen=True)
class Refine:
    """`refine(W, keep, moments, pattern) -> keep`: another mask with the same counts."""

    refine: Callable
    needs: frozenset[str] = frozenset({"gram"})


@dataclass(frozen=True)
class Update:
    """`update(W, keep, moments) -> W'`: other values for the kept weights."""

    update: Callable
    needs: frozenset[str] = frozenset({"gram"})


METHODS: dict[str, Method] = {
    "random": Method(random, needs=frozenset()),
    "magnitude": Method(magnitude, needs=frozenset()),
    "wanda": Method(wanda),
    "ria": Method(ria),
    "snip": Method(snip, needs=frozenset({"gradient"})),
    "fisher": Method(fisher, needs=frozenset({"gradient"})),
    "sparsegpt": Method(sparsegpt, needs=frozenset({"gram"}), mask_only=False),
    "alps": Method(alps, needs=frozenset({"gram"}), mask_only=False),
}
REFINES: dict[str, Refine] = {"dsnot": Refine(dsnot, needs=frozenset({"norm"})), "swaps": Refine(swaps)}
UPDATES: dict[str, Update] = {"pcg": Update(pcg)}
PRESETS: dict[str, dict[str, str]] = {  # papers that are a composition
    "dsnot": {"method": "wanda", "refine": "dsnot"},
    "sparseswaps": {"method": "wanda", "refine": "swaps"},
    "ecoflap": {"method": "wanda", "policy": "ecoflap"},
    "owl": {"method": "wanda", "policy": "owl"},
}


def find_method(method: str | Method | Callable) -> Method:
    """Look a method up by name; a function with a method's signature works wherever a name does."""
    return _find("--method", method, METHODS, Method, lambda f: Method(f, mask_only=False))


def find_refine(refine: str | Refine | Callable | None) -> Refine | None:
    return None if refine is None else _find("--refine", refine, REFINES, Refine, Refine)


def find_update(update: str | Update | Callable | None) -> Update | None:
    return None if update is None else _find("--update", update, UPDATES, Update, Update)


ARGUMENTS = {
    "--method": "(W, moments, pattern, generator)",
    "--refine": "(W, keep, moments, pattern)",
    "--update": "(W, keep, moments)",
}


def _check_signature(option: str, function: Callable, takes: str) -> None:
    count = takes.count(",") + 1
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin may have none
        return
    try:
        signature.bind(*range(count - 1), generator=0) if option == "--method" else signature.bind(*range(count))
    except TypeError:
        raise SparsightError(f"{option}: {function} must be callable as {takes}") from None


def _find(option: str, given: Any, table: dict[str, Any], kind: type, wrap: Callable) -> Any:
    if isinstance(given, kind):
        return given
    if callable(given) and not isinstance(given, type):
        _check_signature(option, given, ARGUMENTS[option])
        return wrap(given)
    if not isinstance(given, str) or given not in table:
        raise SparsightError(f"{option}: unknown {option.lstrip('-')} {given!r}; {nearest(str(given), tuple(table))}")
    return table[given]
