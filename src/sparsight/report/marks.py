"""What the figures share: which runs they take, and how a run is marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsight.errors import SparsightError
from sparsight.report.drawing import COLORS
from sparsight.report.runs import Group, Run
from sparsight.report.scores import Estimate, axis, estimate


def kind(run: Run) -> str:
    return "dense" if run.dense else "restored" if run.restored else "pruned"


def mark(run: Run) -> str:
    return {"dense": "s", "pruned": "v", "restored": "o"}[kind(run)]


def color(run: Run) -> str:
    return {"dense": "#374151", "pruned": COLORS[1], "restored": COLORS[2]}[kind(run)]


def filled(run: Run) -> str:
    return "white" if kind(run) == "pruned" else color(run)


def whiskers(found: Estimate, factor: float) -> np.ndarray:
    """Lengths below and above the value, (2, 1); 0 where there is no interval."""
    if found.low is None or found.high is None:
        return np.zeros((2, 1))
    return factor * np.array([[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]])


def scored(groups: Sequence[Group], metric: str | None) -> list[Group]:
    found = [group for group in groups if estimate(group, metric)]
    need(found, f"runs with {axis(metric)[0]}; record them with sparsight eval --record")
    return found


def need(there: Any, what: str) -> None:
    if not there:
        raise SparsightError(f"this figure needs {what}")
