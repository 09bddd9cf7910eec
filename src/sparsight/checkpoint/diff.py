"""How two models differ, layer by layer: where their zeros are, and how far the weights that both keep have moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsight.checkpoint.folder import family_of, read_record
from sparsight.errors import SparsightError
from sparsight.model.anatomy import anatomy
from sparsight.model.source import check_model
from sparsight.model.stream import open_anatomy

NUMBERS = ("parameters", "zeros_a", "zeros_b", "both", "either", "moved", "size")


def diff(a: Any, b: Any, *, family: str | None = None) -> dict[str, Any]:
    """Compare the prunable layers of two models, folders, of which one block each is in memory, or in memory.

    Returns {"layers", "blocks", "components"}, each by name with {"zeros_a", "zeros_b": counts, "overlap": zeros of both
    over zeros of either, None without any, "drift": ||W_b - W_a|| / ||W_a|| over the weights that neither has as a zero}.

    **Raises** `SparsightError` for models whose layers have other names or shapes.
    """
    one, other = (_layers(model, family) for model in (a, b))
    strange = list(one.keys() ^ other.keys())
    strange += [name for name in one.keys() & other.keys() if one[name].shape != other[name].shape]
    if strange:
        raise SparsightError(f"{_name(a)} and {_name(b)} are other models: {min(strange)} is not the same layer in both")
    sums = {name: _compare(one[name].weight, other[name].weight) for name in one}
    groups: dict[str, dict[str, list[Mapping[str, float]]]] = {"layers": {}, "blocks": {}, "components": {}}
    for name, layer in one.items():
        for kind, key in (("layers", name), ("blocks", layer.block), ("components", layer.component)):
            groups[kind].setdefault(key, []).append(sums[name])
    made = {kind: {key: _ratios(parts) for key, parts in group.items()} for kind, group in groups.items()}
    for name, layer in one.items():
        made["layers"][name] |= {"component": layer.component, "block": layer.block}
    return {"a": _name(a), "b": _name(b), **made}


def _name(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _layers(model: Any, family: str | None) -> dict[str, Any]:
    named = isinstance(model, str | Path)
    if not named:
        check_model(model)
    taken = family_of(read_record(model) if named else None, family)
    body = open_anatomy(model, taken) if named else anatomy(model, taken)
    return {layer.name: layer for layer in body.layers}


def _compare(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """The sums of one layer; `a` and `b` (out, in)."""
    zeros_a, zeros_b = a == 0, b == 0
    kept = ~(zeros_a | zeros_b)
    first, second = a.detach()[kept].double(), b.detach().to(a.device)[kept].double()
    return {
        "parameters": a.numel(),
        "zeros_a": int(zeros_a.sum()),
        "zeros_b": int(zeros_b.sum()),
        "both": int((zeros_a & zeros_b).sum()),
        "either": int((zeros_a | zeros_b).sum()),
        "moved": float((second - first).square().sum()),
        "size": float(first.square().sum()),
    }


def _ratios(parts: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    total = {key: sum(part[key] for part in parts) for key in NUMBERS} if (parts := list(parts)) else {}
    return {
        **{key: int(total[key]) for key in ("parameters", "zeros_a", "zeros_b")},
        "overlap": total["both"] / total["either"] if total["either"] else None,
        "drift": (total["moved"] / total["size"]) ** 0.5 if total["size"] else 0.0,
    }
