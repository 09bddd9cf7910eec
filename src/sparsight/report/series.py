"""Which runs make which figure: plain data, before anything is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsight.model.families import COMPONENTS
from sparsight.report.runs import Group, how

VISION, LANGUAGE = "vision", "language"


@dataclass(frozen=True)
class Series:
    """Groups of one kind, each at its place: a label, or a number."""

    label: str
    points: tuple[tuple[Any, Group], ...]


def fixed_sums(groups: Sequence[Group]) -> dict[float, list[Series]]:
    """By sum of the sparsities of vision and language: a series per way of making, its points at (vision, language).

    A way counts if it was tried with two splits at least, a sum if one of them prunes both components.
    """
    made: dict[float, dict[str, list[tuple[Any, Group]]]] = {}
    for group in groups:
        vision, language = (round(group.first.asked(c), 3) for c in (VISION, LANGUAGE))
        if vision + language > 0 and not group.first.asked("connector"):
            ways = made.setdefault(round(vision + language, 2), {})
            ways.setdefault(how(group.first, "sparsity"), []).append(((vision, language), group))
    found = {}
    for total in sorted(made):
        several = {key: sorted(points, key=_place) for key, points in made[total].items() if len(points) > 1}
        if any(min(split) > 0 for points in several.values() for split, _ in points):
            found[total] = _named(several)
    return found


def component_curves(groups: Sequence[Group]) -> list[Series]:
    """A series per component that was pruned alone and per way of making; its points at the sparsity, the dense at 0."""
    made: dict[str, dict[str, list[tuple[Any, Group]]]] = {}
    for group in groups:
        pruned = [c for c in COMPONENTS if group.first.asked(c) > 0]
        if len(pruned) == 1:
            ways = made.setdefault(pruned[0], {})
            ways.setdefault(how(group.first, "sparsity"), []).append((group.first.asked(pruned[0]), group))
    dense = dense_of(groups)
    found = []
    for component in COMPONENTS:
        ways = {key: sorted(points, key=_place) for key, points in made.get(component, {}).items()}
        for series in _named({key: points for key, points in ways.items() if len(points) > 1}):
            start = ((0.0, dense),) if dense else ()
            label = f"{component}, {series.label}" if series.label else component
            found.append(Series(label, (*start, *series.points)))
    return found


def patterns(groups: Sequence[Group]) -> list[Series]:
    """A series per way of making in which several patterns were tried at the same sparsity; its points at the pattern."""
    made: dict[str, list[tuple[Any, Group]]] = {}
    for group in groups:
        if not group.first.dense:
            made.setdefault(how(group.first, "pattern"), []).append((str(group.first.cell.get("pattern")), group))
    several = {key: sorted(points, key=lambda p: looseness(p[0])) for key, points in made.items() if len(points) > 1}
    return _named(several, sparsity=True)


def looseness(pattern: str) -> tuple[int, int, str]:
    """Order patterns from free to bound: tensor, row, then n:m with larger groups first."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if found:
        return 2, -int(found[2]), pattern
    return {"tensor": 0, "row": 1}.get(pattern, 3), 0, pattern


def pairs(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Every pruned group with each one restored from it."""
    before = {how(group.first): group for group in groups if not group.first.dense and not group.first.restored}
    found = []
    for group in groups:
        if group.first.restored and (start := before.get(how(group.first, "restore"))):
            found.append((start, group))
    return found


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (cost, score) that no other beats: none has a higher score at the same cost or less. By rising cost."""
    found: list[int] = []
    best = -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            found.append(i)
            best = points[i][1]
    return found


@dataclass(frozen=True)
class LayerMap:
    """One component's layers: kinds (rows), blocks (columns) and `values` (kinds, blocks), NaN where there is no layer."""

    component: str
    kinds: tuple[str, ...]
    blocks: tuple[str, ...]
    values: np.ndarray


def layer_maps(layers: Mapping[str, Mapping[str, Any]], what: str) -> list[LayerMap]:
    """Arrange "got" (sparsity) or "error" (relative) of every layer, per component; experts of one kind are averaged."""
    found = []
    for component in COMPONENTS:
        cells: dict[tuple[str, str], list[float]] = {}
        for name, layer in layers.items():
            if layer["component"] == component and layer.get(what) is not None:
                cells.setdefault((kind_of(name, layer["block"]), layer["block"]), []).append(float(layer[what]))
        if cells:
            kinds, blocks = (tuple(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
            values = np.full((len(kinds), len(blocks)), np.nan)
            for (kind, block), numbers in cells.items():
                values[kinds.index(kind), blocks.index(block)] = np.mean(numbers)
            found.append(LayerMap(component, kinds, blocks, values))
    return found


def kind_of(name: str, block: str) -> str:
    """What a layer is within its block, without numbers: `self_attn.q_proj`."""
    inner = name.removeprefix(block).strip(".") or name.rsplit(".", 1)[-1]
    return re.sub(r"(\[\d+\]|\.\d+(?=\.|$)|^\d+\.|^layer\.\d+\.)", "", re.sub(r"^layer\.\d+\.", "", inner)).strip(".")


def dense_of(groups: Sequence[Group]) -> Group | None:
    return next((group for group in groups if group.first.dense), None)


def _place(point: tuple[Any, Group]) -> Any:
    return point[0]


def _named(ways: Mapping[str, Sequence[tuple[Any, Group]]], sparsity: bool = False) -> list[Series]:
    """Name every series by what tells it from the others; unrestored ones first."""
    ordered = sorted(ways.values(), key=lambda points: points[0][1].first.restored)
    parts = [words(points[0][1].first.cell, sparsity) for points in ordered]
    telling = [i for i in range(len(parts[0]) if parts else 0) if len({part[i] for part in parts}) > 1]
    labels = [", ".join(part[i] for i in telling if part[i]) for part in parts]
    found = []
    for n, (label, points) in enumerate(zip(labels, ordered, strict=True)):
        again = labels[:n].count(label)
        found.append(Series(f"{label} ({again + 1})" if again else label, tuple(points)))
    return found


def words(cell: Mapping[str, Any], sparsity: bool = False) -> tuple[str, ...]:
    """How a model was made, in parts: method, pattern, policy, sparsity if wanted, restoration."""
    if cell.get("method") is None:
        return ("dense", "", "", "", "")
    steps = [cell["method"], cell.get("refine"), cell.get("update")]
    steps += [f"reconstruct {cell['reconstruct']}"] if cell.get("reconstruct") else []
    policy = cell.get("policy")
    shares = {c: v for c, v in (cell.get("sparsity") or {}).items() if v}
    return (
        " + ".join(str(step) for step in steps if step),
        str(cell.get("pattern") or ""),
        "" if policy in (None, "uniform") else str(policy),
        ", ".join(f"{component} {100 * share:g}\u00a0%" for component, share in shares.items()) if sparsity else "",
        restoration(cell.get("restore")),
    )


def restoration(restore: Mapping[str, Any] | None) -> str:
    """In words: pruned only, or restored with what."""
    if restore is None:
        return "pruned"
    first = f"reconstruct {restore['reconstruct']} + " if restore.get("reconstruct") else ""
    return f"restored with {first}{restore.get('adapter', 'sparselora')}"


def described(cell: Mapping[str, Any]) -> str:
    """How a model was made, in a line."""
    parts = words(cell, sparsity=True)
    return "dense" if parts[0] == "dense" else ", ".join(part for part in parts if part and part != "pruned")
