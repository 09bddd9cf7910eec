"""The teacher is the dense original, connector included; how it is held in memory depends on how the student was pruned.

`shared`: the method left the kept weights as they were, so one dense copy plus one bit per weight is both models. The
student is the masked weight, the teacher the same layers with their adapters disabled.
`cached`: the hidden states in front of its output head, at answer positions, are computed once and kept on disk; the
student's own head, which is never pruned, makes them logits. No teacher in memory, none in the step (`cache.py`).
`live`: a second model.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparsight.model.anatomy import Anatomy, Layer
from sparsight.model.masks import pack, unpack, weight_hash
from sparsight.restore.head import Head
from sparsight.restore.sparse_lora import adapters

MODES = ("auto", "shared", "cached", "live")
Teacher = Callable[[Any, Mapping[str, Any]], torch.Tensor]  # (student, as it is wrapped, inputs) -> hidden (B, T, d)
Masks = dict[str, torch.Tensor]


def shared_teacher(wrapped: Any, head: Head) -> Teacher:
    """The dense model inside a PEFT model whose base weights are dense: its adapters, connector too, are switched off.

    By their flag: PEFT's own switch visits every module, and makes the factors forget that they are trained.
    """
    adapted = list(adapters(wrapped).values())

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
    """A second model with a head of its own."""
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def hidden(student: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        return head.hidden(model, inputs)

    return hidden


@torch.no_grad()
def read_masks(anatomy: Anatomy, recorded: Container[str] = ()) -> Masks:
    """The packed masks of every sparse layer, whoever pruned it, and of the recorded ones, read from the zeros."""
    return {layer.name: pack(layer.weight != 0) for layer in anatomy.layers if layer.sparse or layer.name in recorded}


@torch.no_grad()
def pruned_too(dense: Anatomy, masks: Masks) -> bool:
    """Whether most of what the masks leave out is zero in `dense` as well: then it is no dense teacher."""
    gone = zero = 0
    for layer, packed in _masked(dense, masks):
        out = ~unpack(packed, layer.shape)
        gone += int(out.sum())
        zero += int((layer.weight[out] == 0).sum())
    return zero > gone / 2


@torch.no_grad()
def masked_hashes(model: nn.Module, anatomy: Anatomy, masks: Masks) -> dict[str, str]:
    """Hash every parameter, pruned ones as their mask leaves them: equal for two models that can share one copy.

    Cost: one pass over the weights; no copy of more than one parameter.
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
                part = W[layer.expert[1]] if layer.expert else W
                part.masked_fill_(~unpack(packed, part.shape), 0)
        hashes[name] = weight_hash(W)
    return hashes


def _masked(anatomy: Anatomy, masks: Masks) -> Iterator[tuple[Layer, torch.Tensor]]:
    return ((layer, masks[layer.name]) for layer in anatomy.layers if layer.name in masks)
