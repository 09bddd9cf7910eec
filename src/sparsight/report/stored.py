"""What a model folder holds, counted from its files without loading the model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsight.evaluate.record import left_out
from sparsight.model.card import component_totals

ITEM = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def folder_facts(folder: Path, record: Mapping[str, Any] | None, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Components, parameters, bytes, bytes with the zeros left out, and hashes, as `Run` has them.

    The weights' files are counted by their headers; without them what the evaluation counted is taken.
    """
    hashes = {key: str(scores[key]) for key in ("fingerprint",) if scores.get(key)}
    stored = sum(_bytes(file) for file in sorted(folder.glob("*.safetensors"))) or None
    if record is None:
        counted = {key: scores.get(key) for key in ("parameters", "bytes", "packed_bytes")}
        if stored is not None:
            counted |= {"bytes": stored, "packed_bytes": stored}
        return {"components": scores.get("components", {}), **counted, "hashes": hashes}
    components = {
        component: {"layers": layers, "zeros": zeros, "parameters": size}
        for component, (layers, zeros, size) in component_totals(record).items()
    }
    saved = sum(left_out(e["zeros"], math.prod(e["shape"]), ITEM.get(e["dtype"], 4)) for e in record["layers"].values())
    total = stored if stored is not None else scores.get("bytes")
    state = hashlib.blake2b((folder / "sparsity.json").read_bytes(), digest_size=16).hexdigest()
    return {
        "components": components,
        "parameters": record.get("parameters") or scores.get("parameters"),
        "bytes": total,
        "packed_bytes": total - saved if total is not None else None,
        "hashes": hashes | {"sparsity.json": state},
    }


def layer_facts(record: Mapping[str, Any] | None, errors: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Per pruned layer its component, block, sparsity and the relative error that pruning caused."""
    layers = record["layers"] if record else {}
    return {
        name: {"component": entry["component"], "block": entry["block"], "got": entry["got"], "error": errors.get(name)}
        for name, entry in layers.items()
    }


def _bytes(path: Path) -> int:
    """Bytes of the tensors of a safetensors file, from its header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return sum(e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items() if name != "__metadata__")
