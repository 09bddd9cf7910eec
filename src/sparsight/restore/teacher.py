"""The teacher is the dense original, connector included; how it is held in memory depends on how the student was pruned.

`shared`: the method left the kept weights as they were, so one dense copy plus one bit per weight is both models. The
student is the masked weight, the teacher the same layers with their adapters disabled.
`live`: anything else; a second model.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, cast

import torch
from torch import nn

from sparsight.model.anatomy import Anatomy
from sparsight.model.masks import pack, unpack, weight_hash
from sparsight.restore.sparse_lora import adapters

Teacher = Callable[[Mapping[str, Any]], torch.Tensor]
Masks = dict[str, torch.Tensor]


def shared_teacher(wrapped: Any) -> Teacher:
    """The dense model inside a PEFT model whose base weights are dense: its adapters, connector too, are switched off.

    PEFT's own `disable_adapter` walks over every module of the model twice; the adapted layers alone will do.
    """
    adapted = list(adapters(wrapped).values())

    @torch.no_grad()
    def logits(inputs: Mapping[str, Any]) -> torch.Tensor:
        try:
            for layer in adapted:
                layer.enable_adapters(False)
            return wrapped(**inputs, use_cache=False).logits
        finally:
            for layer in adapted:
                layer.enable_adapters(True)

    return logits


def live_teacher(model: nn.Module) -> Teacher:
    """A second model."""
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def logits(inputs: Mapping[str, Any]) -> torch.Tensor:
        return model(**inputs, use_cache=False).logits

    return logits


@torch.no_grad()
def read_masks(anatomy: Anatomy, recorded: Container[str] = ()) -> Masks:
    """The packed masks of every sparse layer, whoever pruned it, and of the recorded ones, read from the zeros.

    Fused experts have none: no adapter is put on them, so that they stay as they are.
    """
    layers = [layer for layer in anatomy.layers if layer.expert is None and (layer.sparse or layer.name in recorded)]
    return {layer.name: pack(layer.weight != 0) for layer in layers}


@torch.no_grad()
def pruned_too(model: nn.Module, masks: Masks) -> bool:
    """Whether most of what the masks leave out is zero in `model` as well: then it is no dense teacher."""
    gone = zero = 0
    for name, packed in masks.items():
        W = cast(nn.Linear, model.get_submodule(name)).weight
        out = ~unpack(packed, W.shape)
        gone += int(out.sum())
        zero += int((W[out] == 0).sum())
    return zero > gone / 2


@torch.no_grad()
def masked_hashes(model: nn.Module, masks: Masks) -> dict[str, str]:
    """Hash every parameter, pruned ones as their mask leaves them: equal for two models that can share one copy.

    Cost: one pass over the weights; no copy of more than one layer.
    """
    hashes = {}
    for name, parameter in model.named_parameters():
        packed = masks.get(name.removesuffix(".weight"))
        W = parameter.data
        hashes[name] = weight_hash(W if packed is None else W.masked_fill(~unpack(packed, W.shape), 0))
    return hashes
