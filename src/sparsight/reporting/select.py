"""The runs and layers that each figure shows, as plain data, before anything is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsight.errors import SparsightError
from sparsight.model.families import COMPONENTS
from sparsight.reporting.groups import Group, series_labels, settings_key

VISION, LANGUAGE = "vision", "language"

Point = tuple[Any, Group]  # a group at its place: a number, a split of a sum, or the name of a pattern


class NoFigure(SparsightError):
    """The runs do not make the figure: the message says which runs would."""


def require(content: Any, runs: str) -> None:
    """Refuse a figure without content; `runs` says which runs it needs.

    **Raises** `NoFigure`.
    """
    if not content:
        raise NoFigure(f"this figure needs {runs}")


@dataclass(frozen=True)
class Series:
    """Groups that differ in one setting, in the order of that setting; the label is empty for a series that is alone."""

    label: str
    points: tuple[Point, ...]


def fixed_sums(groups: Sequence[Group]) -> dict[float, list[Series]]:
    """By sum of the sparsities of vision and language: a series per way of pruning, its points at (vision, language).

    A way counts if it has two splits at least, a sum if one of its splits prunes both components.
    """
    splits: dict[float, list[Point]] = {}
    for group in groups:
        vision, language = (round(group.first.target_sparsity(c), 3) for c in (VISION, LANGUAGE))
        if vision + language > 0 and not group.first.target_sparsity("connector"):
            splits.setdefault(round(vision + language, 2), []).append(((vision, language), group))
    sums = {total: _series(splits[total], "sparsity") for total in sorted(splits)}
    return {total: ways for total, ways in sums.items() if any(min(split) > 0 for way in ways for split, _ in way.points)}


def single_components(groups: Sequence[Group]) -> list[Series]:
    """A series per component that was pruned alone and per way of pruning; its points at the sparsity, the dense at 0."""
    points: dict[str, list[Point]] = {component: [] for component in COMPONENTS}
    for group in groups:
        amounts = {c: group.first.target_sparsity(c) for c in COMPONENTS}
        components = [component for component in COMPONENTS if amounts[component] > 0]
        if len(components) == 1:
            points[components[0]].append((amounts[components[0]], group))
    dense = dense_group(groups)
    start = ((0.0, dense),) if dense else ()
    return [
        Series(f"{component}, {way.label}" if way.label else component, (*start, *way.points))
        for component in COMPONENTS
        for way in _series(points[component], "sparsity")
    ]


def patterns(groups: Sequence[Group]) -> list[Series]:
    """A series per way of pruning that has several patterns at the same sparsity; its points at the pattern."""
    points = [(str(group.first.cell.get("pattern")), group) for group in groups if not group.first.is_dense]
    return _series(points, "pattern", pattern_order)


def pattern_order(pattern: str) -> tuple[int, int, str]:
    """A key that sorts patterns from free to strict: tensor, row, then n:m with larger groups first."""
    groups = re.fullmatch(r"(\d+):(\d+)", pattern)
    if groups:
        return 2, -int(groups[2]), pattern
    return {"tensor": 0, "row": 1}.get(pattern, 3), 0, pattern


def _series(points: Sequence[Point], varied: str, order: Callable[[Any], Any] = lambda place: place) -> list[Series]:
    """Series of two points or more that differ in the `varied` setting alone; those without restoration first."""
    ways: dict[str, list[Point]] = {}
    for place, group in points:
        ways.setdefault(settings_key(group.first, varied), []).append((place, group))
    several = [sorted(way, key=lambda point: order(point[0])) for way in ways.values() if len(way) > 1]
    several.sort(key=lambda way: way[0][1].first.is_restored)
    labels = series_labels([way[0][1].first.cell for way in several], varied)
    return [Series(label, tuple(way)) for label, way in zip(labels, several, strict=True)]


def restorations(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Every pruned group with each group that was restored from it."""
    pruned = {settings_key(g.first): g for g in groups if not g.first.is_dense and not g.first.is_restored}
    restored = [(settings_key(group.first, "restore"), group) for group in groups if group.first.is_restored]
    return [(pruned[key], group) for key, group in restored if key in pruned]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points (cost, score) that no other has a higher score at the same cost or less; by rising cost."""
    front: list[int] = []
    best = -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front


@dataclass(frozen=True)
class LayerMap:
    """One component's layers: kinds (rows), blocks (columns) and `values` (kinds, blocks), NaN where there is no layer."""

    component: str
    kinds: tuple[str, ...]
    blocks: tuple[str, ...]
    values: np.ndarray


def layer_maps(layers: Mapping[str, Mapping[str, Any]], fact: str) -> list[LayerMap]:
    """Arrange "got" (sparsity) or "error" (relative) of every layer, per component; experts of one kind are averaged."""
    maps = []
    for component in COMPONENTS:
        cells: dict[tuple[str, str], list[float]] = {}
        for name, layer in layers.items():
            if layer["component"] == component and layer.get(fact) is not None:
                cells.setdefault((layer_kind(name, layer["block"]), layer["block"]), []).append(float(layer[fact]))
        if cells:
            kinds, blocks = (tuple(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
            values = np.full((len(kinds), len(blocks)), np.nan)
            for (kind, block), numbers in cells.items():
                values[kinds.index(kind), blocks.index(block)] = np.mean(numbers)
            maps.append(LayerMap(component, kinds, blocks, values))
    return maps


def layer_kind(name: str, block: str) -> str:
    """The name of a layer within its block, without numbers: `self_attn.q_proj`."""
    inner = name.removeprefix(block).strip(".") or name.rsplit(".", 1)[-1]
    return re.sub(r"(\[\d+\]|\.\d+(?=\.|$)|^\d+\.|^layer\.\d+\.)", "", re.sub(r"^layer\.\d+\.", "", inner)).strip(".")


def dense_group(groups: Sequence[Group]) -> Group | None:
    """The first group of a dense model; None without one."""
    return next((group for group in groups if group.first.is_dense), None)
