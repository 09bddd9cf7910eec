"""A SparseLoRA adapter on disk, in a format that stock PEFT refuses.

Beside an `adapter_config.json`, stock `PeftModel.from_pretrained` would put plain LoRA layers on the model, whose merge is
dense, and load no masked factor into them. There is none here, so it refuses; `load_adapter` is the reader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sparsight.errors import SparsightError, quote
from sparsight.files import read_json
from sparsight.masks.bits import mask_hash, pack, packed_hash
from sparsight.masks.matrix import mask_of
from sparsight.model.anatomy import Anatomy
from sparsight.restoring.adapters import ADAPTERS
from sparsight.restoring.checkpoints import factor_tensors, load_factor_tensors, read_factors, save_factors
from sparsight.restoring.peft_layers import (
    ADAPTER,
    AdapterTarget,
    MaskedExperts,
    MaskedLinear,
    adapted_modules,
    add_adapters,
)

MANIFEST = "sparse_lora.json"
OLD_KINDS = {"full": "masked-full", "mask": "frozen"}  # as adapters of version 0.1 name them


def save_adapter(wrapped: Any, alpha: float, folder: Path) -> None:
    """Write the factors of a PEFT model, not yet merged, and a manifest with the hashes of the masks."""
    folder.mkdir()
    save_factors(factor_tensors(wrapped), folder)
    layers: dict[str, Any] = {}
    modules: dict[str, Any] = adapted_modules(wrapped)
    for name, module in modules.items():
        if isinstance(module, MaskedExperts):
            for key in module.names:
                every = pack(torch.ones(getattr(module.base_layer, key).shape[1:], dtype=torch.bool))
                for i, bits in enumerate(getattr(module, f"keep_{key}").cpu()):
                    mask = None if torch.equal(bits, every) else packed_hash(bits)
                    layers[f"{name}.{key}.{i}"] = {"rank": module.rank, "form": module.kind, "mask": mask}
        elif isinstance(module, MaskedLinear):
            mask = None if module.keep is None else packed_hash(module.keep)
            layers[name] = {"rank": module.rank, "form": module.kind, "mask": mask}
        else:
            layers[name] = {"rank": module.r[ADAPTER], "form": "lora", "mask": None}
    manifest = {"format": 2, "type": "sparse_lora", "alpha": alpha, "layers": layers}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def load_adapter(model: Any, anatomy: Anatomy, folder: str | Path) -> Any:
    """Put a saved adapter on the sparse model it was trained for, in place; returns the PEFT model.

    The masks are read from the model's zeros. **Raises** `SparsightError` if the folder holds no such adapter or a
    layer's zeros are not those the adapter was trained with.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise SparsightError(f"{folder}: has no {MANIFEST}; give the adapter folder that restore `save_adapter` wrote")
    manifest = read_json(path, "copy the adapter again from where it came from")
    try:
        entries = {name: (entry["mask"], entry["form"], int(entry["rank"])) for name, entry in manifest["layers"].items()}
        alpha = float(manifest["alpha"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SparsightError(f"{path}: is damaged ({error!r}); copy the adapter again from where it came from") from error
    layers = {layer.name: layer for layer in anatomy.layers}
    targets = []
    for name, (mask, form, rank) in entries.items():
        if name not in layers:
            raise SparsightError(f"{folder}: the adapter is for a model with a layer {name}, which this one does not have")
        W, masked = layers[name].weight, mask is not None
        if masked and mask_hash(W) != mask:
            raise SparsightError(f"{folder}: the adapter was trained with other zeros in {name}; load its own sparse model")
        kind = OLD_KINDS.get(form, form)
        if kind != "lora" and kind not in ADAPTERS:
            raise SparsightError(f"{path}: {name} has an adapter {quote(form)}, which this version does not know")
        targets.append(AdapterTarget(layers[name], rank, pack(mask_of(W)) if masked else None, kind))
    tensors = read_factors(Path(folder))  # before the model is changed
    wrapped = add_adapters(model, targets, alpha=alpha)
    load_factor_tensors(wrapped, tensors)
    return wrapped
