"""The budget: a sparsity and a pattern per component, read from what the user writes."""

from __future__ import annotations

from collections.abc import Mapping

from sparsight.checks import check_name_of, parse_pairs
from sparsight.errors import SparsightError
from sparsight.masks.pattern import Pattern, check_sparsity
from sparsight.model.families import COMPONENTS

PRUNED_BY_DEFAULT = ("vision", "language")


def parse_budget(sparsity: str | float | Mapping[str, float]) -> dict[str, float]:
    """Read a sparsity per component: `0.5` for vision and language, or `vision=0.5,language=0.6`.

    A component that is not named stays dense; so does the connector unless it is named.

    **Raises** `SparsightError` for an unknown component, a value that is no sparsity, and a budget without zeros.
    """
    pairs: Mapping[str, str | float]
    if isinstance(sparsity, Mapping):
        pairs = {check_name_of("component", "sparsity", str(k), COMPONENTS): v for k, v in sparsity.items()}
    elif isinstance(sparsity, str) and "=" in sparsity:
        pairs = parse_pairs(sparsity, "sparsity", COMPONENTS, "vision=0.5,language=0.6")
    else:
        pairs = dict.fromkeys(PRUNED_BY_DEFAULT, sparsity)
    budget = dict.fromkeys(COMPONENTS, 0.0)
    budget.update({component: _fraction(value) for component, value in pairs.items()})
    if not any(budget.values()):
        raise SparsightError(f"`sparsity`: {sparsity} leaves every component dense; give at least one a sparsity above 0")
    return budget


def parse_pattern(pattern: str | Pattern | Mapping[str, str]) -> dict[str, Pattern]:
    """Read a pattern per component: `row`, `tensor`, `n:m` or a `Pattern` for all, or `vision=tensor,language=row`.

    A component that is not named has `row`.

    **Raises** `SparsightError` for an unknown component, and for what is no pattern.
    """
    if isinstance(pattern, str) and "=" in pattern:
        pattern = parse_pairs(pattern, "pattern", COMPONENTS, "vision=tensor,language=row")
    if not isinstance(pattern, Mapping):
        return dict.fromkeys(COMPONENTS, pattern if isinstance(pattern, Pattern) else Pattern.parse(pattern))
    names = {check_name_of("component", "pattern", str(k), COMPONENTS): v for k, v in pattern.items()}
    return {component: Pattern.parse(names.get(component, "row")) for component in COMPONENTS}


def _fraction(value: str | float) -> float:
    try:
        return check_sparsity(float(value))
    except (TypeError, ValueError):
        raise SparsightError(
            f"`sparsity`: {value!r} is not a number; give the fraction of zeros, from 0 to below 1, as in 0.5"
        ) from None
