"""The teacher is the dense original, connector included; its place in memory depends on how the student was pruned.

`shared`: the method did not change the kept weights, so one dense copy plus one bit per weight is both models. The
student is the masked weight, the teacher the same layers with their adapters disabled.
`cached`: the hidden states in front of its output head, at answer positions, are computed once and kept on disk; the
student's own head, which is never pruned, turns them into logits. No teacher in memory or in the step
(`teacher_cache.py`).
`live`: a second model.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparsight.masks.bits import pack, unpack, weight_hash
from sparsight.masks.matrix import mask_of
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.restoring.head import Head
from sparsight.restoring.peft_layers import adapted_modules

MODES = ("auto", "shared", "cached", "live")
Teacher = Callable[[Any, Mapping[str, Any]], torch.Tensor]  # (wrapped student, inputs) -> hidden (B, T, d)
Masks = dict[str, torch.Tensor]


def shared_teacher(wrapped: Any, head: Head) -> Teacher:
    """Return a teacher that runs a PEFT model on dense base weights with its adapters off, those of the connector too.

    They are turned off by their flag: PEFT's own switch visits every module, and sets `requires_grad` of the factors.
    """
    adapted = list(adapted_modules(wrapped).values())

    @torch.no_grad()
    def hidden(student: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        try:
            for module in adapted:
                module._disable_adapters = True
            return head.hidden(student, inputs)
        finally:
            for module in adapted:
                module._disable_adapters = False

    return hidden


def live_teacher(model: nn.Module, head: Head) -> Teacher:
    """Return a teacher that runs `model`, which gets eval mode and no gradients, in place, with a `head` of its own."""
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def hidden(student: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        return head.hidden(model, inputs)

    return hidden


@torch.no_grad()
def read_masks(anatomy: Anatomy, recorded: Container[str] = ()) -> Masks:
    """Return the packed masks of all sparse layers and of those in `recorded`, by name, read from the zeros."""
    return {layer.name: pack(mask_of(layer.weight)) for layer in anatomy.layers if layer.sparse or layer.name in recorded}


@torch.no_grad()
def pruned_too(dense: Anatomy, masks: Masks) -> bool:
    """Whether most weights outside the masks are zero in `dense` as well; then it is no dense teacher."""
    gone = zero = 0
    for layer, packed in _masked(dense, masks):
        out = ~unpack(packed, layer.shape)
        gone += int(out.count_nonzero())
        zero += int((out & ~mask_of(layer.weight)).count_nonzero())
    return zero > gone / 2


@torch.no_grad()
def masked_hashes(model: nn.Module, anatomy: Anatomy, masks: Masks) -> dict[str, str]:
    """Hash every parameter, after its mask if it has one; two models with equal hashes can share one copy.

    Cost: one pass over the weights, and a copy of one parameter at a time.
    """
    pruned: dict[int, list[tuple[Layer, torch.Tensor]]] = {}
    for layer, packed in _masked(anatomy, masks):
        pruned.setdefault(id(layer.parameter), []).append((layer, packed))
    hashes = {}
    for name, parameter in model.named_parameters():
        W = parameter.data
        if id(parameter) in pruned:
            W = W.clone()
            for layer, packed in pruned[id(parameter)]:
                part = layer.part_of(W)
                part.masked_fill_(~unpack(packed, part.shape), 0)
        hashes[name] = weight_hash(W)
    return hashes


def _masked(anatomy: Anatomy, masks: Masks) -> Iterator[tuple[Layer, torch.Tensor]]:
    return ((layer, masks[layer.name]) for layer in anatomy.layers if layer.name in masks)
