"""The pruned blocks on disk, so that a crash costs one block.

For a mask-only method an entry holds the masks, one bit per weight; for any other the weights themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparsight import distributed
from sparsight.errors import SparsightError, first_line
from sparsight.files import read_json, replace_file, write_json
from sparsight.masks.bits import pack, unpack
from sparsight.masks.matrix import keep_only, mask_of
from sparsight.model.anatomy import Layer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Journal:
    """Entries of pruned blocks in `folder`: NAME.json with the measurements, NAME.safetensors with masks or weights."""

    folder: Path
    mask_only: bool
    files: ClassVar[None] = None  # of weights; they are written once all blocks are done

    def finish(self) -> None:
        """Nothing is left to do."""

    def store(self, block: str, layers: Sequence[Layer], facts: dict) -> None:
        """Write the pruned layers of `block` and `facts`, its measurements; only the main process does.

        The tensors are written last: an entry with them is complete.
        """
        if not distributed.is_main():
            return
        tensors = {x.name: pack(mask_of(x.weight)) if self.mask_only else x.weight.clone() for x in layers}
        if not self.mask_only:  # a permutation reorders biases, too
            tensors |= {f"{x.name}.bias": _bias(x).clone() for x in layers if _bias(x) is not None}
        path = self._path(block)
        with replace_file(path) as beside:
            save_file(tensors, beside)
            write_json(path.with_suffix(".json"), facts, indent=None)

    @torch.no_grad()
    def recall(self, block: str, layers: Sequence[Layer]) -> dict | None:
        """Prune `layers` in place as an earlier run did; return its facts, or None if there is no entry.

        Every process calls it; only the main one reads.
        """
        device = str(layers[0].weight.device)
        entry = distributed.on_main(lambda: self._read(block, device))
        if entry is None:
            return None
        tensors, facts = entry
        for layer in layers:
            W, stored = layer.weight, tensors[layer.name]
            layer.write(keep_only(W, unpack(stored, W.shape)) if self.mask_only else stored)
            if (bias := _bias(layer)) is not None and f"{layer.name}.bias" in tensors:
                bias.copy_(tensors[f"{layer.name}.bias"])
        return facts

    def _read(self, block: str, device: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        path = self._path(block)
        if not path.is_file():
            return None
        try:
            return load_file(path, device=device), read_json(path.with_suffix(".json"), "it is pruned again")
        except (OSError, SafetensorError, SparsightError) as error:
            logger.warning("%s cannot be read (%s); its block is pruned again", path, first_line(error))
            return None

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def _bias(layer: Layer) -> Any:
    bias = None if layer.expert else getattr(layer.module, "bias", None)
    return None if bias is None else bias.data
