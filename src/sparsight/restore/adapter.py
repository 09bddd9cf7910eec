"""A SparseLoRA adapter on disk, in a form that stock PEFT cannot take for a dense LoRA.

Stock `PeftModel.from_pretrained` would load such an adapter silently and merge it densely. There is no
`adapter_config.json` here, so it refuses; `load_adapter` is the reader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy
from sparsight.model.masks import mask_hash, pack, packed_hash
from sparsight.restore.sparse_lora import ADAPTER, SparseLoraLinear, adapters, add_adapters
from sparsight.restore.trainer import ADAPTER_FILE, adapter_tensors, load_adapter_tensors

MANIFEST = "sparse_lora.json"


def save_adapter(wrapped: Any, alpha: float, folder: Path) -> None:
    """Write A and B of every layer of a PEFT model, not yet merged, and a manifest with the hashes of the masks."""
    folder.mkdir()
    save_file(adapter_tensors(wrapped), folder / ADAPTER_FILE)
    layers = {
        name: {"rank": layer.r[ADAPTER], "mask": packed_hash(layer.keep) if isinstance(layer, SparseLoraLinear) else None}
        for name, layer in adapters(wrapped).items()
    }
    manifest = {"format": 1, "type": "sparse_lora", "alpha": alpha, "layers": layers}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def load_adapter(model: Any, anatomy: Anatomy, folder: str | Path) -> Any:
    """Put a saved adapter on the sparse model it was trained for, in place; returns the PEFT model.

    The masks are read from the model's zeros. **Raises** `SparsightError` if the folder holds no such adapter or a
    layer's zeros are not those the adapter was trained with.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise SparsightError(f"{folder}: has no {MANIFEST}; give the adapter folder that restore --save-adapter wrote")
    manifest = json.loads(path.read_text())
    weights = {layer.name: layer.weight for layer in anatomy.layers}
    layers = {}
    for name, entry in manifest["layers"].items():
        if name not in weights:
            raise SparsightError(f"{folder}: the adapter is for a model with a layer {name}, which this one has not")
        masked = entry["mask"] is not None
        if masked and mask_hash(weights[name]) != entry["mask"]:
            raise SparsightError(f"{folder}: the adapter was trained with other zeros in {name}; load its own sparse model")
        layers[name] = (entry["rank"], pack(weights[name] != 0) if masked else None)
    wrapped = add_adapters(model, layers, alpha=manifest["alpha"])
    load_adapter_tensors(wrapped, load_file(Path(folder) / ADAPTER_FILE))
    return wrapped
