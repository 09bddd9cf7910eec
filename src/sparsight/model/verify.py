"""Prove that the zeros of a saved model are the zeros that were promised: recount, compare hashes, name what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.model.checkpoint import read_anatomy, read_plan, read_record
from sparsight.model.load import load_model
from sparsight.model.masks import mask_hash, pack, unpack, weight_hash


@torch.no_grad()
def verify(folder: str | Path, against: str | Path | None = None) -> dict[str, Any]:
    """Recount the zeros of every layer of `folder` and compare them with its `sparsity.json`.

    With `against`, every weight that is zero there must be zero here too. Returns `{"layers", "zeros", "sparsity",
    "differences": {layer: [what differs]}}`; no difference means the proof holds. Nothing is written. Memory: one model
    and, with `against`, one bit per weight of the other.

    **Raises** `SparsightError` if there is nothing to compare with.
    """
    record = read_record(folder)
    if record is None and against is None:
        raise SparsightError(f"{folder}: has no sparsity.json to verify; name a sparse folder to compare with --against")
    promised = _masks(against) if against is not None else {}
    body = read_anatomy(load_model(folder), record)
    differences: dict[str, list[str]] = {}
    if record is not None:
        differences = _against_record(body, record)
    layers = {layer.name: layer for layer in body.layers}
    for name, (packed, shape) in promised.items():
        problem = _lost(layers.get(name), packed, shape)
        if problem:
            differences.setdefault(name, []).append(problem)
    checked = [layers[n] for n in (record["layers"] if record else promised) if n in layers]
    zeros = sum(int((layer.weight == 0).sum()) for layer in checked)
    total = sum(layer.weight.numel() for layer in checked)
    return {
        "folder": str(folder),
        "against": str(against) if against is not None else None,
        "layers": len(checked),
        "zeros": zeros,
        "sparsity": zeros / total if total else 0.0,
        "differences": differences,
    }


def _against_record(body: Anatomy, record: dict[str, Any]) -> dict[str, list[str]]:
    layers = {layer.name: layer for layer in body.layers}
    plan = read_plan(record)
    differences = {}
    for name, entry in record["layers"].items():
        layer = layers.get(name)
        if layer is None:
            differences[name] = ["the model has no such layer"]
            continue
        W = layer.weight
        found = []
        dtype = str(W.dtype).removeprefix("torch.")
        if list(layer.shape) != entry["shape"]:
            found.append(f"shape is {list(layer.shape)}, recorded {entry['shape']}")
        else:
            zeros = int((W == 0).sum())
            if zeros != entry["zeros"]:
                found.append(f"{zeros} zeros, recorded {entry['zeros']}")
            if not plan[name].holds(W):
                found.append(f"does not hold the pattern {plan[name]}")
        if dtype != entry["dtype"]:
            found.append(f"dtype is {dtype}, recorded {entry['dtype']}")
        elif not found:
            if mask_hash(W) != entry["mask"]:
                found.append("the zeros are in other places (mask hash differs)")
            if weight_hash(W) != entry["weight"]:
                found.append("the weights are not those that were written (weight hash differs)")
        if found:
            differences[name] = found
    return differences


def _masks(folder: str | Path) -> dict[str, tuple[torch.Tensor, tuple[int, int]]]:
    """The zeros of a folder, one bit each, of every sparse or recorded layer that has any."""
    record = read_record(folder)
    body = read_anatomy(load_model(folder), record)
    chosen = [layer for layer in body.layers if layer.sparse or (record and layer.name in record["layers"])]
    masks = {layer.name: (pack(layer.weight == 0), layer.shape) for layer in chosen if (layer.weight == 0).any()}
    if not masks:
        raise SparsightError(f"{folder}: holds no zeros to compare with; give a pruned folder to --against")
    return masks


def _lost(layer: Layer | None, packed: torch.Tensor, shape: tuple[int, int]) -> str | None:
    if layer is None:
        return "the model has no such layer"
    if layer.shape != tuple(shape):
        return f"shape is {list(layer.shape)}, the other's is {list(shape)}"
    lost = int((unpack(packed, shape) & (layer.weight != 0)).sum())
    return f"{lost} zeros lost" if lost else None
