"""Merge a trained model into files, with the merged weights of one part of it in memory at a time.

A merge in place would hold a second copy of every layer: on a CPU the frozen weights are only mapped from their files.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from sparsight.checkpoint.parts import PartFiles
from sparsight.model.families import Family
from sparsight.model.skeleton import Unfit
from sparsight.model.stream import Stream
from sparsight.restoring.peft_layers import MaskedTuner, adapted_modules

INSIDE = ".base_layer"  # what PEFT puts into the names of parameters of adapted modules


def write_merged(wrapped: Any, source: str | Path, folder: Path, family: Family | None, device: str) -> PartFiles:
    """Write the weights of a PEFT model, merged, into files in `folder`; the model stays as it is.

    `source` is the sparse model that it was made from; the stream of the result reads the files. **Raises** `Unfit` where
    the model cannot be in parts, `OSError` for a full disk.
    """
    model = wrapped.base_model.model
    first = next(model.parameters())
    stream = Stream(source, dtype=first.dtype, device=device, family=family)
    files = PartFiles(stream)
    adapted = adapted_modules(wrapped)
    own = {name.replace(INSIDE, ""): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in stream.model.state_dict().items():
        if name not in own or (own[name].dtype, own[name].shape) != (tensor.dtype, tensor.shape):
            raise Unfit(f"{name} is not as in {source}")
    files.folder = folder
    files.make()
    for part in stream.parts:
        stream.put(part, {**{name: own[name] for name in stream.names(part)}, **_merged(adapted, stream.names(part))})
        files.write(part)
        stream.sources[part] = partial(files.read, part)
        stream.put(part, None)
    return files


@torch.no_grad()
def _merged(adapted: dict[str, LoraLinear | MaskedTuner], names: list[str]) -> dict[str, torch.Tensor]:
    """The merged parameters among `names`, by name."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = adapted.get(path)
        if module is not None and leaf != "bias" and name not in found:
            found |= {f"{path}.{own}": nn.Parameter(E, requires_grad=False) for own, E in merged_weights(module).items()}
    return found


@torch.no_grad()
def merged_weights(module: LoraLinear | MaskedTuner) -> dict[str, torch.Tensor]:
    """The weights that merging an adapted module would give, by name; the module stays as it is."""
    if isinstance(module, MaskedTuner):
        return module.effective()
    weight = cast(nn.Linear, module.get_base_layer()).weight
    before = weight.data
    weight.data = before.clone()  # it is merged in place
    module.merge()
    merged, weight.data = weight.data, before
    module.merged_adapters.clear()
    return {"weight": merged}
