"""Check the zeros of a saved model against its record: recount, compare hashes, list the differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsight.checkpoint.folder import Record, family_of, read_plan, read_record
from sparsight.checkpoint.pack import StoredLayer, stored_layers
from sparsight.errors import SparsightError
from sparsight.masks.bits import mask_hash, pack, unpack, weight_hash
from sparsight.masks.matrix import count_zeros, mask_of
from sparsight.masks.pattern import Pattern
from sparsight.model.anatomy import Layer, anatomy
from sparsight.model.source import check_model
from sparsight.model.stream import open_anatomy


@dataclass(frozen=True)
class Zeros:
    """Where the weights of a model are zero: packed masks and shapes of its sparse layers, one bit per weight."""

    name: str
    masks: dict[str, tuple[torch.Tensor, tuple[int, int]]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, name: str = "", family: str | None = None) -> Zeros:
        """Read the zeros of a folder, or of a model in memory. **Raises** `SparsightError` for a model without any."""
        named = isinstance(model, str | Path)
        if not named:
            check_model(model, "against")
        record = read_record(model) if named else None
        taken = family_of(record, family)
        body = open_anatomy(model, taken) if named else anatomy(model, taken)
        layers = [layer for layer in body.layers if layer.sparse or (record and layer.name in record["layers"])]
        masks = {layer.name: (pack(~mask_of(layer.weight)), layer.shape) for layer in layers if layer.zeros}
        if not masks:
            raise SparsightError(f"{_name(model)}: holds no zeros to compare with; give a pruned folder to `against`")
        return cls(name or _name(model), masks)


@torch.no_grad()
def verify(model: Any, against: Any = None, loaded: Any = None, family: str | None = None) -> dict[str, Any]:
    """Recount the zeros of every layer of a model, in a folder or in memory, and compare them.

    A folder is compared with its `sparsity.json`; `loaded` is its model where it was loaded before; `family` says where a
    model of unknown type keeps its blocks, where no record says so. Every weight that is
    zero in `against`, a folder, a model or its `Zeros`, must be zero here too; a plan, or what `prune` returned, must hold.
    Returns `{"layers", "zeros", "sparsity", "differences": {layer: [what differs]}}`, without differences if the check
    succeeds. Writes nothing. Memory: one block and, with `against`, one bit per weight of the other.

    **Raises** `SparsightError` if there is nothing to compare with.
    """
    record = read_record(model) if isinstance(model, str | Path) else None
    if record is None and against is None:
        raise SparsightError(
            f"{_name(model)}: has no sparsity.json to verify; name a sparse folder to compare with `against`"
        )  # fmt: skip
    if record is None and loaded is None and not isinstance(model, str | Path):
        check_model(model)
    plan = recorded_plan("against", against)
    zeros = against if isinstance(against, Zeros) else None
    if against is not None and plan is None and zeros is None:
        zeros = Zeros.of(against, family=family)
    masks = zeros.masks if zeros else {}
    layers = _layers(model, loaded, record, family, {*((record or {}).get("layers", ())), *masks, *(plan or {})})
    recorded = record["layers"] if record is not None else {}
    of_record = read_plan(record)
    counted = recorded or plan or masks
    differences: dict[str, list[str]] = {}
    count = total = 0
    for name in [*recorded, *(name for name in {**masks, **(plan or {})} if name not in recorded)]:
        problems = ["the model has no such layer"]
        if (layer := layers.get(name)) is not None:
            W = layer.weight  # read once
            problems = _against_record(W, recorded[name], of_record[name]) if name in recorded else []
            problems += _lost(W, *masks[name]) if name in masks else []
            problems += _broken(W, plan[name]) if plan and name in plan else []
            if name in counted:
                count, total = count + count_zeros(W), total + W.numel()
        if problems:
            differences[name] = problems
    return {
        "folder": _name(model),
        "against": zeros.name if zeros else None if against is None else "the plan",
        "layers": sum(name in layers for name in counted),
        "zeros": count,
        "sparsity": count / total if total else 0.0,
        "differences": differences,
    }


def _layers(
    model: Any, loaded: Any, record: dict[str, Any] | None, family: str | None, names: set[str]
) -> Mapping[str, Layer | StoredLayer]:  # fmt: skip
    """The layers of a model by name; those of a packed folder are read from its files, one at a time, if all can be."""
    folder = isinstance(model, str | Path)
    if folder and loaded is None and (stored := stored_layers(model, names)) is not None:
        return stored
    taken = family_of(record, family)
    body = open_anatomy(model, taken) if folder and loaded is None else anatomy(model if loaded is None else loaded, taken)
    return {layer.name: layer for layer in body.layers}


def recorded_plan(field: str, record: Any) -> Mapping[str, Pattern] | None:
    """The plan of a record of pruning, of a `sparsity.json`, or of what has one; None for anything else, as a model.

    **Raises** `SparsightError`, naming `field`, for a mapping that is no plan, and for a plan without layers.
    """
    if isinstance(record, Record):
        record = record.sparsity
    if isinstance(record, Mapping) and {"format", "layers"} <= set(record):
        return read_plan(record)
    plan = record if isinstance(record, Mapping) else getattr(record, "plan", None)
    if plan is not None and not (isinstance(plan, Mapping) and plan and all(isinstance(p, Pattern) for p in plan.values())):
        raise SparsightError(f"`{field}`: {type(record).__name__} is no plan; give what `plan`, `prune` or `save` returned")
    return plan


def _name(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _broken(W: torch.Tensor, pattern: Pattern) -> list[str]:
    return [] if pattern.holds(W) else [f"does not hold the pattern {pattern}"]


def _against_record(W: torch.Tensor, entry: Mapping[str, Any], pattern: Pattern) -> list[str]:
    if list(W.shape) != entry["shape"]:
        return [f"shape is {list(W.shape)}, recorded {entry['shape']}"]
    return _of_weight(W, entry, pattern)


def _of_weight(W: torch.Tensor, entry: Mapping[str, Any], pattern: Pattern) -> list[str]:
    problems = []
    zeros, dtype = count_zeros(W), str(W.dtype).removeprefix("torch.")
    exact = entry["weight"] is not None  # else rounded to int8, in another form than in memory
    if zeros != entry["zeros"] if exact else zeros < entry["zeros"]:
        problems.append(f"{zeros} zeros, recorded {entry['zeros']}")
    if not pattern.holds(W):
        problems.append(f"does not hold the pattern {pattern}")
    if dtype != entry["dtype"]:
        problems.append(f"dtype is {dtype}, recorded {entry['dtype']}")
    elif exact and not problems:
        if mask_hash(W) != entry["mask"]:
            problems.append("the zeros are in other places (mask hash differs)")
        if weight_hash(W) != entry["weight"]:
            problems.append("the weights are not those that were written (weight hash differs)")
    return problems


def _lost(W: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> list[str]:
    if tuple(W.shape) != tuple(shape):
        return [f"shape is {list(W.shape)}, the other's is {list(shape)}"]
    lost = int((unpack(packed, shape) & mask_of(W)).count_nonzero())
    return [f"{lost} zeros lost"] if lost else []
