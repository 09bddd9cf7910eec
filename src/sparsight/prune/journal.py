"""What pruning has done so far, block by block, so that a crash costs one block.

A method that leaves kept weights alone is written as masks, one bit per weight; any other as the weights themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsight.model.anatomy import Layer
from sparsight.model.masks import pack, unpack


@dataclass(frozen=True)
class Journal:
    folder: Path
    mask_only: bool

    def store(self, block: str, layers: Sequence[Layer], facts: dict) -> None:
        """Write the pruned layers of `block` and what was measured; the entry appears whole or not at all."""
        tensors = {x.name: pack(x.weight != 0) if self.mask_only else x.weight.clone() for x in layers}
        if not self.mask_only:  # a permutation reorders biases, too
            tensors |= {f"{x.name}.bias": _bias(x).clone() for x in layers if _bias(x) is not None}
        path = self._path(block)
        save_file(tensors, path.with_suffix(".part"))
        path.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
        path.with_suffix(".part").replace(path)

    @torch.no_grad()
    def recall(self, block: str, layers: Sequence[Layer]) -> dict | None:
        """Prune `layers` in place as an earlier run did; None if it did not get so far."""
        path = self._path(block)
        if not path.is_file():
            return None
        tensors = load_file(path, device=str(layers[0].weight.device))
        for layer in layers:
            found = tensors[layer.name]
            W = layer.weight
            layer.write(W.masked_fill(~unpack(found, W.shape), 0) if self.mask_only else found)
            if (bias := _bias(layer)) is not None and f"{layer.name}.bias" in tensors:
                bias.copy_(tensors[f"{layer.name}.bias"])
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def _bias(layer: Layer) -> Any:
    bias = None if layer.expert else getattr(layer.module, "bias", None)
    return None if bias is None else bias.data
