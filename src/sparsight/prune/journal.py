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

from sparsight import processes
from sparsight.model.anatomy import Layer
from sparsight.model.masks import pack, unpack


@dataclass(frozen=True)
class Journal:
    folder: Path
    mask_only: bool

    def store(self, block: str, layers: Sequence[Layer], facts: dict) -> None:
        """Write the pruned layers of `block` and what was measured; the entry appears whole or not at all. Only the main
        process does."""
        if not processes.is_main():
            return
        tensors = {x.name: pack(x.weight != 0) if self.mask_only else x.weight.clone() for x in layers}
        if not self.mask_only:  # a permutation reorders biases, too
            tensors |= {f"{x.name}.bias": _bias(x).clone() for x in layers if _bias(x) is not None}
        path = self._path(block)
        save_file(tensors, path.with_suffix(".part"))
        path.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
        path.with_suffix(".part").replace(path)

    @torch.no_grad()
    def recall(self, block: str, layers: Sequence[Layer]) -> dict | None:
        """Prune `layers` in place as an earlier run did; None if it did not get so far. The main process's word counts."""
        device = str(layers[0].weight.device)
        found = processes.agreed(self._read(block, device) if processes.is_main() else None)
        if found is None:
            return None
        tensors, facts = found
        for layer in layers:
            W, kept = layer.weight, tensors[layer.name]
            layer.write(W.masked_fill(~unpack(kept, W.shape), 0) if self.mask_only else kept)
            if (bias := _bias(layer)) is not None and f"{layer.name}.bias" in tensors:
                bias.copy_(tensors[f"{layer.name}.bias"])
        return facts

    def _read(self, block: str, device: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        path = self._path(block)
        if not path.is_file():
            return None
        return load_file(path, device=device), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def _bias(layer: Layer) -> Any:
    bias = None if layer.expert else getattr(layer.module, "bias", None)
    return None if bias is None else bias.data
