"""Settings as a person gives them: checked before anything else, and written down as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError
from sparsight.model.families import COMPONENTS
from sparsight.plan.budget import check_component, nearest, parse_pairs

SEEDS = 2**32


def plain(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The named settings as values that YAML and JSON can hold."""
    return {name: _plain(given[name]) for name in names}


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a number of numpy or torch
        return value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if callable(value) or any(callable(getattr(value, step, None)) for step in STEPS):
        return name_of(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return str(value)


STEPS = ("prune", "refine", "update", "select", "weigh", "importance")  # what an entry of a table wraps


def name_of(function: Any) -> str:
    """The name of a method, a policy or another step, given by name, as a function or as what wraps one."""
    if isinstance(function, str):
        return function
    inner = next((f for step in STEPS if callable(f := getattr(function, step, None))), function)
    return getattr(inner, "__name__", type(inner).__name__)


def whole_name(model: str | Path) -> str:
    """How a record names a model: a folder by its whole path, a hub name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def check_whole(option: str, value: Any, *, optional: bool = False) -> None:
    """Refuse what is not a whole number of at least 1."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SparsightError(f"{option}: {value!r} is not a whole number of at least 1")


def check_choice(option: str, value: str, allowed: Any, word: str = "") -> None:
    """Refuse what is not one of `allowed`, naming the nearest of them."""
    if value not in allowed:
        known = nearest(value, tuple(allowed)) if allowed else "none is installed"
        raise SparsightError(f"{option}: unknown {value!r}; {word + ' ' if word and allowed else ''}{known}")


def check_above_zero(option: str, value: float) -> None:
    """Refuse what is not a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise SparsightError(f"{option}: {value:g} is not a number above 0")


def check_seed(seed: Any) -> None:
    """Refuse a seed that some generator would not take."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise SparsightError(f"--seed: {seed!r} is not a whole number from 0 to {SEEDS - 1}")


def parse_ranks(rank: int | str | Mapping[str, int] | None) -> dict[str, int]:
    """Read `vision=4,connector=2,language=8`; a component that is not named keeps its default. `8` is for all of them."""
    if rank is None:
        return {}
    if isinstance(rank, int) or (isinstance(rank, str) and rank.strip().lstrip("-").isdecimal()):
        pairs: Mapping[str, Any] = dict.fromkeys(COMPONENTS, int(rank))
    else:
        pairs = parse_pairs(rank, "--rank", "vision=4,connector=2,language=8") if isinstance(rank, str) else dict(rank)
    ranks = {}
    for component, value in pairs.items():
        check_component(component, "--rank")
        least = 0 if component == "connector" else 1
        if not (str(value).isascii() and str(value).isdigit()) or int(value) < least:
            raise SparsightError(f"--rank: {component}={value} is not a whole number of at least {least}")
        ranks[component] = int(value)
    return ranks


def parse_list(value: str | Sequence[str]) -> tuple[str, ...]:
    """Read `one,two`, or several of them."""
    return tuple(word.strip() for word in (value.split(",") if isinstance(value, str) else value) if word.strip())
