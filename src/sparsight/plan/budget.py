"""How much sparsity each component carries, as a person writes it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from sparsight.errors import SparsightError
from sparsight.model.families import COMPONENTS
from sparsight.plan.pattern import check_sparsity

PRUNED_BY_DEFAULT = ("vision", "language")


def parse_budget(given: str | float | Mapping[str, float]) -> dict[str, float]:
    """Read a sparsity per component: `0.5` for vision and language, or `vision=0.5,language=0.6`.

    A component that is not named stays dense; so does the connector unless it is named.
    """
    pairs: Mapping[str, str | float]
    if isinstance(given, Mapping):
        pairs = {check_component(str(k), "--sparsity"): v for k, v in given.items()}
    elif isinstance(given, str) and "=" in given:
        pairs = parse_pairs(given, "--sparsity", "vision=0.5,language=0.6")
    else:
        pairs = dict.fromkeys(PRUNED_BY_DEFAULT, given)
    budget = dict.fromkeys(COMPONENTS, 0.0)
    budget.update({component: _fraction(value) for component, value in pairs.items()})
    if not any(budget.values()):
        raise SparsightError(f"--sparsity: {given} leaves every component dense; give at least one a sparsity above 0")
    return budget


def parse_pairs(text: str, option: str, example: str) -> dict[str, str]:
    """Read `component=value,...`."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        component, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise SparsightError(f"{option}: {part.strip()!r} is not COMPONENT=VALUE; write for example {example}")
        check_component(component, option)
        if component in pairs:
            raise SparsightError(f"{option}: {component} is given twice in {text!r}; give it once")
        pairs[component] = value
    return pairs


def check_component(name: str, option: str) -> str:
    if name not in COMPONENTS:
        raise SparsightError(f"{option}: unknown component {name!r}; {nearest(name, COMPONENTS)}")
    return name


def nearest(name: str, allowed: tuple[str, ...]) -> str:
    """Say what is allowed, and the nearest of it if there is one."""
    close = difflib.get_close_matches(str(name).lower(), allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def _fraction(value: str | float) -> float:
    try:
        return check_sparsity(float(value))
    except (TypeError, ValueError):
        raise SparsightError(
            f"--sparsity: {value!r} is not a number; give the fraction of zeros, from 0 to below 1, as in 0.5"
        ) from None
